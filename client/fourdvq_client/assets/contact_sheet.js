"use strict";
// Sorting, filtering and marks of the contact sheet. Nothing is stored and nothing is sent: marks become a command.
const table = document.querySelector("table");
const scans = Array.from(document.querySelectorAll("tbody"));
const form = document.querySelector("form");
const command = document.querySelector("#command");
const count = document.querySelector("#count");
const gravity = Array.from(form.elements.grade, (box) => box.value);

function visible() { return Array.from(table.tBodies).filter((scan) => !scan.hidden); }

function filter() {
  const wanted = new FormData(form);
  const grades = wanted.getAll("grade");
  const text = wanted.get("text").trim().toLowerCase();
  for (const scan of scans) {
    const { grade, code, decision, name } = scan.dataset;
    scan.hidden = !(
      grades.includes(grade)
      && (wanted.get("code") === "" || code.split(" ").includes(wanted.get("code")))
      && (wanted.get("decision") === "" || wanted.get("decision") === decision)
      && name.includes(text)
    );
  }
  document.body.classList.toggle("plain", !wanted.has("pictures"));
  count.textContent = `${visible().length} of ${scans.length} scans`;
}

function sort(header) {
  const column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const number = !header.classList.contains("word");
  const key = (scan) => {
    const text = scan.rows[0].cells[column].textContent.trim();
    if (header.textContent === "grade") return gravity.indexOf(scan.dataset.grade);
    return number ? Number(text) : text;
  };
  const empty = (scan) => scan.rows[0].cells[column].textContent.trim() === "";
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const order = (a, b) => compare(a, b) * (down ? -1 : 1);
  const sorted = scans.map((scan) => [empty(scan), key(scan), scan])
    .sort((a, b) => a[0] - b[0] || order(a[1], b[1]));  // what has no value comes last either way
  table.append(...sorted.map((row) => row[2]));
}

function mark(scan, what) {
  if (!scan || !scan.dataset.content) return;
  if (what) scan.dataset.mark = what; else delete scan.dataset.mark;
  scan.querySelector(".mark").textContent = what ? `to ${what}` : "";
  // The content goes with the name: a scan that was made again since is not decided about unseen. The site's folder does
  // not, because this file names no path.
  const lines = ["approve", "reject"].map((verb) => {
    const names = visible().concat(scans.filter((s) => s.hidden))
      .filter((s) => s.dataset.mark === verb).map((s) => `${s.dataset.name}@${s.dataset.content}`);
    return names.length ? `fourdvq-client qc ${verb} ${names.join(" ")}` : "";
  });
  command.textContent = lines.filter(Boolean).join("\n");
}

function move(step) {
  const shown = visible();
  const at = shown.indexOf(document.activeElement.closest("tbody"));
  const next = shown[Math.min(Math.max(at + step, 0), shown.length - 1)];
  if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "start" }); }
}

form.addEventListener("input", filter);
form.addEventListener("submit", (event) => { event.preventDefault(); move(1); });
for (const header of table.tHead.rows[0].cells) {
  header.querySelector("button").addEventListener("click", () => sort(header));
}
document.querySelector("#copy").addEventListener("click", () => {
  const range = document.createRange();
  range.selectNodeContents(command);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  document.execCommand("copy");
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=search], select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const scan = document.activeElement.closest("tbody");
  const keys = {
    j: () => move(1), k: () => move(-1), a: () => mark(scan, "approve"), r: () => mark(scan, "reject"),
    u: () => mark(scan, ""), "/": () => form.elements.text.focus(),
  };
  if (event.key in keys) { event.preventDefault(); keys[event.key](); }
});
filter();
