"""Every code that a person can meet: what it is called, why it happens, what is expected, and what to do.

`E_` blocks, `V_` sends a scan to review, `W_` warns. Codes in capitals without a prefix are the ones that may cross the
wire; each blocking code maps to one of them, because the coordinator learns the kind of a failure and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """One code, explained: `fix` is the next step a person takes; `wire` is the code that may leave the site."""

    title: str
    why: str
    wanted: str
    fix: str
    wire: str = "INTERNAL"


_E = Explanation

# What may leave a site about a failure. One code per task, no counts, no names.
WIRE_CODES: dict[str, Explanation] = {
    "PROTOCOL_MISMATCH": _E(
        "the two sides speak different protocol numbers",
        "one side was updated and the other was not",
        "the same protocol number on both sides",
        "install the package version that the invitation names",
    ),
    "CODE_MISMATCH": _E(
        "the installed package is not the one the policy allows",
        "the package changed after the policy was written",
        "the sha256 in policy.yaml",
        "have the data officer approve the new package hash",
    ),
    "PLAN_NOT_APPROVED": _E(
        "no person at this site has approved this plan",
        "every experiment is approved once by a person at each site",
        "an entry in policy.yaml: allowed_plans",
        "fourdvq-client approve --latest",
    ),
    "PLAN_MISMATCH": _E(
        "a task field differs from the approved plan",
        "a task may not change what the plan determines",
        "the value of the approved plan",
        "the coordinator must start a new run with the changed plan",
    ),
    "PROFILE_MISMATCH": _E(
        "the site's preprocessing profile is not the federation's",
        "voxel values depend on the profile, so every site must use the same one",
        "the profile hash of the plan",
        "take the federation's profile.json and run `fourdvq-client preprocess` again",
    ),
    "ROLE_REFUSED": _E(
        "this site's role does not allow the task",
        "an external site never trains",
        "a task for the site's role",
        "nothing to do at the site",
    ),
    "TASK_REFUSED": _E(
        "this site's policy does not allow the task",
        "allowed_tasks in policy.yaml does not list it",
        "a task in allowed_tasks",
        "have the data officer decide whether to allow it",
    ),
    "FIELD_OUT_OF_BOUNDS": _E(
        "a field of the task is outside what the site accepts",
        "the site's policy bounds rounds, steps and sizes",
        "a value inside the policy's bounds",
        "the coordinator must ask for less",
    ),
    "STALE_ROUND": _E(
        "the round is not newer than the last one answered",
        "an old task was delivered late or twice",
        "a round above the last answered",
        "nothing to do; the next round is accepted",
    ),
    "REPLAY": _E(
        "this task was answered before", "a task is answered once", "a new task id", "nothing to do at the site"
    ),
    "PARENT_MISMATCH": _E(
        "the weights do not hash to the task's parent",
        "the transfer was cut short or the task was assembled wrongly",
        "weights with the announced sha256",
        "nothing to do at the site; the coordinator resends",
    ),
    "MODEL_REJECTED": _E(
        "the received model is not one this site can use",
        "names, shapes, types or values differ from the plan's architecture",
        "finite tensors of the plan's architecture",
        "the coordinator must resume from its last good round",
    ),
    "TOO_FEW_PATIENTS": _E(
        "too few patients took part for anything to leave",
        "an update of few patients can be inverted to their scans",
        "at least the policy's minimum number of patients",
        "add approved scans, or lower the minimum with the data officer",
    ),
    "COHORT_CHANGED": _E(
        "the cohort is not the one that was approved",
        "a cohort that changes between rounds exposes the patient that changed",
        "the cohort hash in allowed_plans",
        "fourdvq-client approve --latest",
    ),
    "EGRESS_REFUSED": _E(
        "the reply holds something that may not leave",
        "the guard lets out only what the message type declares and the policy allows",
        "the declared fields, finite and within size",
        "look at audit.jsonl at the site for the rule",
    ),
    "COX_REFUSED": _E(
        "a disclosure rule of the survival analysis said no",
        "sums over few patients reveal them",
        "the cox rules of policy.yaml",
        "`fourdvq-client audit show` at the site names the rule; one_run: `fourdvq-client survival allow-rerun`",
    ),
    "DP_BUDGET": _E(
        "the privacy budget is spent",
        "each private round costs",
        "a total below epsilon_max",
        "no further private rounds on this cohort",
    ),
    "LEDGER_INVALID": _E(
        "the privacy ledger is damaged or was rolled back",
        "the ledger is hash-chained",
        "an intact ledger",
        "restore the ledger file and tell the data officer",
    ),
    "LEDGER_BUSY": _E(
        "another process holds the privacy ledger",
        "one process spends at a time",
        "one client per site folder",
        "stop the other client",
    ),
    "DATA_INVALID": _E(
        "the site's data cannot be used for this task",
        "scans or tables are missing or not approved",
        "approved scans and a readable clinical table",
        "fourdvq-client check --data",
    ),
    "NONFINITE": _E(
        "a value became infinite or not a number",
        "training diverged or an input is damaged",
        "finite losses and weights",
        "the last good state was kept; lower the learning rate or inspect the data",
    ),
    "OUT_OF_MEMORY": _E(
        "memory ran out",
        "the volume or the batch is too large for this machine",
        "a step that fits",
        "set `train: {memory: low, micro_batch: 1}` in site.yaml, or use a larger GPU",
    ),
    "DISK_FULL": _E(
        "the disk is full",
        "checkpoints and prepared scans need room",
        "room for three checkpoints",
        "free space and start again; nothing was lost",
    ),
    "TIMEOUT": _E(
        "the work took longer than the round allows",
        "the deadline of the round passed",
        "an answer within the deadline",
        "the coordinator can raise federation.deadline_s",
    ),
    "CANCELLED": _E(
        "the work was stopped by a person",
        "the run or the client was stopped",
        "a run in progress",
        "start the client again",
    ),
    "INTERNAL": _E(
        "an error that was not foreseen",
        "see the site's log",
        "no error",
        "send logs/client.jsonl to support after reading it",
    ),
}

CODES: dict[str, Explanation] = {
    **WIRE_CODES,
    # configuration and command line
    "E_KEY": _E("an unknown key", "a typing error, or a key of another version", "one of the known keys", "correct the key; `show-config` prints all of them", "PLAN_MISMATCH"),
    "E_TYPE": _E("a value of the wrong type", "YAML reads unquoted no, off, 007 and 3e-4 as something else than text", "the declared type", "correct the value; quote text", "PLAN_MISMATCH"),
    "E_VALUE": _E("a value outside its allowed range", "the value would make the computation wrong or impossible", "a value in range", "correct the value", "PLAN_MISMATCH"),
    "E_MISSING": _E("a required value is missing", "it has no default", "a value", "add it", "PLAN_MISMATCH"),
    "E_USAGE": _E("the command cannot be understood", "an option or argument is wrong", "a call as in --help", "see --help"),
    "E_NORM": _E("batch normalisation cannot be federated", "batch statistics at batch size 1 cannot be averaged over sites and leak statistics", "norm=group for more than one training site", "set model.norm=group"),
    "E_FILE": _E("a file is missing", "it was moved or never made", "the file", "make or restore the file", "DATA_INVALID"),
    "E_FOLDER": _E("a folder is missing", "it was moved or never made", "the folder", "make the folder or correct the path", "DATA_INVALID"),
    "E_NOT_A_SITE": _E("this folder is not a site folder", "site.yaml is missing", "a folder made by `fourdvq-client init`", "run `fourdvq-client init`, or give --workdir"),
    "E_NOT_A_PROJECT": _E("this folder is not a coordinator folder", "server.yaml is missing", "a folder made by `fourdvq-server init`", "run `fourdvq-server init`, or give --workdir"),
    "E_RIGHTS": _E("this account may not read or write here", "the file or its folder belongs to another account, or its mode forbids it", "a right to read, and in the site folder also to write", "give this account the right, or run the command as the account that owns the folder", "DATA_INVALID"),
    "E_STORAGE": _E("a disk or share does not answer", "it was unmounted, became read-only or is failing", "a disk that can be read and written", "bring the disk or share back, then run the same command again"),
    "E_EXISTS": _E("something is already there", "an earlier run made it", "a free name", "choose another name, or remove the old one"),
    "E_BUSY": _E("another process uses this folder or key", "two clients with one key fight for the same messages", "one process per folder", "stop the other process; its id is named above"),
    "E_PORT": _E("the port is in use", "another program listens there", "a free port", "stop the other program, or choose another port with --port"),
    "E_INTERRUPTED": _E("stopped by the user", "Ctrl-C or a signal", "an uninterrupted run", "run the same command again; it resumes"),
    "E_UNREACHABLE": _E("the coordinator cannot be reached", "network, proxy, firewall or a stopped server", "an open connection to the coordinator", "fourdvq-client check --network"),
    "E_DOWNLOAD": _E("a file cannot be downloaded", "the address is wrong, the server or the proxy says no, or the connection broke", "the whole file", "run the same command again: it goes on where it stopped; or fetch the file elsewhere and give it with --from FILE"),
    "E_ACTIVATION": _E("the coordinator does not accept this site now", "the key is not registered, or an earlier connection with it is still counted as online for up to a minute", "a registered key with no other connection", "wait a minute and try again; if it persists ask the coordinator to approve the key"),
    "E_QUORUM": _E("too few sites answered", "sites were offline, too slow or refused", "at least federation.quorum valid replies", "see who is missing with `fourdvq-server status`, then `fourdvq-server resume`"),
    "E_NO_APPROVAL": _E("too few sites have approved the plan", "a person at each site approves the plan once", "approval by the quorum", "ask the sites to run `fourdvq-client approve --latest`"),
    # replies that the coordinator puts aside
    "E_REPLY": _E("a reply that belongs to another task", "it names another run, round, task or plan than was asked", "a reply to the task that was sent", "the site joins the next round; if it repeats, install the same version on both sides"),
    "E_PAYLOAD": _E("a reply whose content is not what its site hashed", "it was cut short or changed on its way", "content with the announced sha256", "the site joins the next round; if it repeats, look for a proxy that rewrites"),
    "E_SITE_NAME": _E("a site that calls itself by another name", "its folder belongs to another key than it connected with", "the name under which its key is registered", "correct `site:` in site.yaml, or approve the right key"),
    "E_AUDIT": _E("a site's audit log did not move on", "each reply adds a line to it, so the same head twice means a log that was put back", "a new audit head with every reply", "run `fourdvq-client audit verify` at the site"),
    "E_ROLE": _E("a site answers in another role than it was admitted with", "its site.yaml was changed after it was approved", "the role of its approval", "correct `role:` in site.yaml, or approve the site again"),
    "E_RUN": _E("no such run", "the name is wrong or the run was never started", "the name of a run folder", "fourdvq-server status lists the runs"),
    "E_CHECKPOINT": _E("a checkpoint is damaged or incomplete", "its sha256 does not fit, or a file of it is missing", "a complete checkpoint", "remove the damaged round folder; the run resumes from the one before", "MODEL_REJECTED"),
    "E_WEIGHTS": _E("weights do not fit", "names, shapes, types or the sha256 differ", "weights of this architecture", "use the weights that belong to this plan", "MODEL_REJECTED"),
    "E_NONFINITE": _E("not a number or infinite", "training diverged or an input is damaged", "finite values", "see `explain NONFINITE`", "NONFINITE"),
    "E_PEER": _E("another training process of this site is gone", "one of several processes on this machine's devices died or hangs", "as many processes as devices, all alive", "read the log for the first error; `train: {devices: 1}` in site.yaml trains on one device"),
    "E_TOKENIZER": _E("codes of another tokenizer", "codes mean the same thing only under one frozen encoder and codebook", "the tokenizer_sha256 of the frozen model", "encode again with the frozen model", "MODEL_REJECTED"),
    "E_PROTOCOL": _E("another protocol number", "one side was updated and the other was not", "the same protocol number", "install the version that the invitation names", "PROTOCOL_MISMATCH"),
    "E_PROFILE": _E("another preprocessing profile", "voxel values depend on the profile", "the federation's profile", "take the federation's profile.json and preprocess again", "PROFILE_MISMATCH"),
    "E_POLICY": _E("the policy cannot be read", "the door stays closed while its rules are unknown", "a complete policy.yaml of schema 1", "correct policy.yaml; `fourdvq-client policy check` names the place", "EGRESS_REFUSED"),
    "E_AUDIT_LOG": _E("the audit log is not sound or cannot be written", "lines were edited, removed or reordered, or the disk or its rights say no", "an unbroken, writable audit.jsonl", "fourdvq-client audit verify; restore the file from a backup, and tell the data officer", "EGRESS_REFUSED"),
    "E_STATE": _E("the record of answered rounds cannot be read", "state/accepted.json is damaged; without it an old task could be answered twice", "an intact state/accepted.json", "restore it from a backup, or remove it together with the runs it names", "EGRESS_REFUSED"),
    "E_READ_ONLY": _E("this account may not change the policy", "policy.yaml belongs to root or to the data officer", "a person who may write policy.yaml", "have that person add the entry shown", "PLAN_NOT_APPROVED"),
    "E_IDENTIFIER": _E("the text holds something that identifies", "a patient id, a path or a date stands in what would be sent", "aggregates only", "remove it from the report, then submit again", "EGRESS_REFUSED"),
    "E_MESSAGE": _E("a message that does not have its declared form", "fields, tensors or types differ from the message type", "exactly the declared fields", "install the same version on both sides", "EGRESS_REFUSED"),
    "E_EGRESS": _E("this may not leave the site", "the guard found something the policy does not allow", "a reply within the policy", "see audit.jsonl for the rule", "EGRESS_REFUSED"),
    "E_INVITE": _E("the invitation cannot be used", "it is damaged, expired or of another federation", "an invitation made by `fourdvq-server invite`", "ask the coordinator for a new invitation"),
    "E_TLS": _E("the TLS connection cannot be verified", "certificate, name or time is wrong, or a proxy opens the connection", "the coordinator's certificate, signed by the CA of the invitation", "fourdvq-client check --network; ask IT to pass the address through unopened"),
    "E_DNS": _E("the coordinator's name cannot be resolved", "the name is wrong, or this network does not know it", "an address for the name", "ask IT whether outside names are resolved here, or only by the proxy"),
    "E_PROXY": _E("the proxy does not let the connection through", "HTTPS_PROXY is wrong, or the proxy refuses this host, port or user", "a CONNECT tunnel to the coordinator's address", "ask IT to allow CONNECT to the coordinator's host and port"),
    "E_CLOCK": _E("the clock of this machine is wrong", "signatures carry the time; more than 5 s ahead or 5 min behind is refused", "a clock within a few seconds of the coordinator's", "switch on time synchronisation (NTP)"),
    "E_FLOWER": _E("another version of Flower", "the connection uses parts of Flower that change between versions", "flwr 1.41", "install the version that this package pins"),
    "E_KEY_FILE": _E("the site's key cannot be used", "it is missing, of another kind, or readable by others", "an elliptic-curve key with mode 0600", "restore keys/site.key or run `fourdvq-client init` again"),
    "E_RELEASE": _E("no released model", "the release stage has not run, or its files are damaged", "a release with a matching sha256", "fourdvq-server release, then fourdvq-client pull", "MODEL_REJECTED"),
    "E_UNSUPPORTED": _E("not possible with these settings", "the combination has no defined result", "a supported combination", "change one of the settings named above"),
    "E_INTERNAL": _E("an error that was not foreseen", "a bug, or a machine in trouble", "no error", "run again with -v and report the text"),
    # the image gate (numbers in brackets: rows of the bad-input table)
    "E_EMPTY": _E("no image in the folder", "the path is wrong or the export is empty", "DICOM, .nii, .nii.gz, .mha or .nrrd files", "correct `scans:` in site.yaml", "DATA_INVALID"),
    "E_NOTCT": _E("not a CT image", "another modality or a screenshot", "Modality CT", "leave it out of the export", "DATA_INVALID"),
    "E_DERIVED": _E("not an original series", "a localizer, report or reformat", "ImageType ORIGINAL", "nothing to do; it is skipped", "DATA_INVALID"),
    "E_CORRUPT": _E("the file cannot be read", "it is cut short or damaged", "a complete file", "export the series again", "DATA_INVALID"),
    "E_READ": _E("a scan's files cannot be opened", "a share is not there, or a right to read is missing", "files that can be read to their end", "bring the share or the right back; the next run tries again by itself", "DATA_INVALID"),
    "E_SYNTAX": _E("unsupported transfer syntax", "the pixels are compressed in a way this installation cannot read", "a readable transfer syntax", "install the named extra, or export uncompressed", "DATA_INVALID"),
    "E_GAP": _E("a slice is missing", "the export is incomplete", "equidistant slices", "export the series again", "DATA_INVALID"),
    "E_DUP": _E("two slices at one position", "two acquisitions were mixed", "one slice per position", "export one series only", "DATA_INVALID"),
    "E_SPACING": _E("uneven slice spacing", "slices are missing or of several reconstructions", "slices within 1 % of the spacing, or 0.065 mm, of even places", "export one reconstruction only", "DATA_INVALID"),
    "E_TILT": _E("tilted gantry", "the slices are sheared against their axis", "slices along their normal", "export an untilted series", "DATA_INVALID"),
    "E_MIXED": _E("mixed images in one series", "orientation, size or spacing differ", "one geometry per series", "export one series only", "DATA_INVALID"),
    "E_GEOMETRY": _E("position or orientation is missing", "the header lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing", "complete geometry tags", "export with complete headers", "DATA_INVALID"),
    "E_RESCALE": _E("Hounsfield scale is missing or wrong", "RescaleSlope or RescaleIntercept is absent, or contradicts the pixels", "rescale tags in every slice that fit its pixels", "export with complete headers", "DATA_INVALID"),
    "E_HU": _E("intensities are not Hounsfield units", "wrong intercept, a window burnt in, or 8-bit export", "air near -1000 HU", "export original CT values", "DATA_INVALID"),
    "E_THICK": _E("slices are too thick", "thin structures are lost", "the profile's max_thickness_mm", "export the thin reconstruction", "DATA_INVALID"),
    "E_FOV": _E("the lung is cut by the field of view", "the scan does not cover the whole lung", "both lungs inside the image", "use a full chest scan", "DATA_INVALID"),
    "E_NOLUNG": _E("no lung found", "the scan is not of the chest, or segmentation failed", "at least 1000 ml of lung", "check the export; only chest CT can be used", "DATA_INVALID"),
    "E_ONELUNG": _E("only one lung found", "a pneumonectomy, a crop or a failed segmentation", "lung on both sides of the midline", "review the scan; give a mask if both lungs are there", "DATA_INVALID"),
    "E_NIFTI": _E("the image file has no usable geometry or values", "4-D, 8-bit, windowed, or its two forms disagree", "a 3-D image in Hounsfield units", "convert again from DICOM", "DATA_INVALID"),
    "E_NAN": _E("the image holds values that are not numbers", "a conversion went wrong", "finite values", "convert again from DICOM", "DATA_INVALID"),
    "E_STACKS": _E("several stacks in one file", "an enhanced multi-frame file with more than one volume", "one stack", "export the stacks separately", "DATA_INVALID"),
    "E_BURNED": _E("text is burnt into the pixels", "it may name the patient", "pixels without text", "export without annotation", "DATA_INVALID"),
    "E_ARCHIVE": _E("an archive instead of images", "archives are not unpacked", "a folder of images", "unpack it and run again", "DATA_INVALID"),
    "E_BOMB": _E("the header announces more voxels than allowed", "a damaged or hostile file", "at most the policy's max_voxels", "leave the file out", "DATA_INVALID"),
    "E_REG": _E("the registration failed or folded", "the scans are too different, or too few landmarks were found", "a smooth alignment with Dice above 0.90", "review the pair", "DATA_INVALID"),
    "E_CRASH": _E("the process that worked on this scan died", "an image library gave up on it, or somebody killed it", "a process that lives", "look at the file with another program; then `fourdvq-client preprocess --retry-failed`", "DATA_INVALID"),
    "E_SLOW": _E("a scan took longer than allowed", "a huge or damaged scan, or a machine with too much to do", "an end within --scan-minutes, and of reading within limits.decode_seconds of policy.yaml", "fourdvq-client preprocess --retry-failed --scan-minutes 600", "TIMEOUT"),
    "E_MASK": _E("the lung mask does not fit its scan", "size or position differ, or it is empty", "a mask on the scan's own grid", "make the mask again", "DATA_INVALID"),
    # tables
    "E_TABLE": _E("a table cannot be read", "its separator, header or encoding is not understood", "a CSV file with the documented columns", "compare with the example in the site template", "DATA_INVALID"),
    "E_COLUMN": _E("a column is missing", "its name differs from the documented one", "the column, or a mapping in site.yaml: columns", "add the column or the mapping", "DATA_INVALID"),
    "E_ID": _E("a patient is in one table only", "an id was mistyped, or a table is older than the other", "each patient in scans and in clinical.csv", "correct the id in the table named above", "DATA_INVALID"),
    "E_DUPLICATE": _E("a patient or scan appears twice", "a row was copied", "one row each", "remove the second row", "DATA_INVALID"),
    "E_DATE": _E("a date cannot be used", "unreadable, in the future or before birth", "YYYY-MM-DD", "correct the row, then run `fourdvq-client scan`", "DATA_INVALID"),
    "E_TIME": _E("a follow-up time cannot be used", "negative, or before the last scan", "days since the first scan, 0 or more", "correct the row, then run `fourdvq-client scan`", "DATA_INVALID"),
    "E_AGE": _E("an age cannot be used", "below 18, above 110 or not a number", "years from 18 to 110", "correct the row", "DATA_INVALID"),
    "E_WORD": _E("an unknown word in a coded column", "the table uses its own words", "a word of site.yaml: values", "add the word to site.yaml: values", "DATA_INVALID"),
    "E_IDENTITY": _E("one patient id, two persons", "birth date or sex differs between scans, or the headers of one patient's scan hold the id of another", "one person per id", "correct the export", "DATA_INVALID"),
    "E_FEW": _E("too few patients or scans", "the cohort is below the smallest useful size", "more approved scans", "add scans", "TOO_FEW_PATIENTS"),
    "E_NO_APPROVED": _E("no approved scan", "training reads approved scans only", "decisions in prep/review.csv", "fourdvq-client qc approve", "DATA_INVALID"),
    "E_PATIENT": _E("no such patient", "the id or pseudonym is not in the manifest", "an id or pseudonym of this site", "fourdvq-client qc list", "DATA_INVALID"),
    "E_NO_RESULT": _E("a scan without a result cannot be decided about", "it was refused, it failed, it is damaged, or it is to be made again", "a scan that `qc list` shows with a grade", "fourdvq-client preprocess makes it again; then look at it", "DATA_INVALID"),
    "E_CONTENT": _E("the scan is no longer what was looked at", "it was made again after the contact sheet was written, so nobody has seen what would be decided about", "the content on the sheet", "fourdvq-client qc open; look at the scan again, then copy the new command", "DATA_INVALID"),
    # generation
    "E_GIVEN": _E("too few scans to generate from", "the model needs the change between two scans", "at least two approved scans at different times", "add an earlier or later scan", "DATA_INVALID"),
    "E_TIMES": _E("times cannot be used", "not increasing, two on one day, or before the first scan", "strictly increasing years since the first scan", "correct --interval, --years or --times", "DATA_INVALID"),
    "E_HORIZON": _E("beyond the supported horizon", "the model never saw times that far ahead", "times within the training window", "ask for fewer years", "DATA_INVALID"),
    "E_CONTROLS": _E("a table without its control rows", "a model's figures mean nothing without the copy of the last scan and the ceiling beside them", "all control rows of the evaluation", "score the trajectories with `score_trajectories`, which returns them together"),
    # survival
    "E_SURVIVAL_INPUT": _E("the survival table cannot be used", "a column breaks a rule", "finite times of 0 or more, events 0 or 1, complete covariates", "correct the named column", "DATA_INVALID"),
    "E_COX_RULE": _E("a disclosure rule said no", "sums over few patients reveal them", "the cox rules of policy.yaml", "`fourdvq-client audit show` names the rule; one_run: `fourdvq-client survival allow-rerun`", "COX_REFUSED"),
    # review and warnings
    "V_ONELUNG": _E("one lung, or a ratio out of range", "a small lung, or a failed segmentation", "left/right ratio 0.5 to 1.6", "look at the picture and decide", "DATA_INVALID"),
    "V_EXPIR": _E("probably expiratory", "15 % less volume than the patient's other scans", "inspiratory scans", "look at the picture and decide", "DATA_INVALID"),
    "V_NOISE": _E("very noisy", "motion, metal or dose", "noise within range", "look at the picture and decide", "DATA_INVALID"),
    "V_REG": _E("registration in doubt", "overlap or smoothness between the grades", "Dice of 0.95, no folding", "look at the picture and decide", "DATA_INVALID"),
    "V_MASK": _E("mask in doubt", "made by the threshold method, out of range, or in more than two parts", "a checked mask", "look at the picture and decide", "DATA_INVALID"),
    "V_VOLUME": _E("lung volume out of range", "outside 1000 to 8000 ml", "1000 to 8000 ml", "look at the picture and decide", "DATA_INVALID"),
    "W_VOLUME": _E("the lung's volume changed by more than 35 %", "breathing, disease or a failed mask", "a change below 35 % from the baseline", "look at the picture and decide"),
    "W_BF16": _E("this machine computes bfloat16 wrongly or slowly", "some cuDNN versions return wrong 3D convolutions, and some processors have no instructions for it", "bfloat16 that agrees with float32", "nothing to do: float32 is used; newer torch and cuDNN may help"),
    "W_MEMORY": _E("memory ran out once and the step was cut smaller", "the volumes fill the device", "a step that fits", "set `train: {memory: low}` in site.yaml to start that way"),
    "W_SKIPPED": _E("optimiser steps were left out", "a loss or gradient was not a finite number", "finite losses", "look for a damaged scan if it happens again"),
    "W_PIXEL": _E("pixel size outside the paper's range", "0.38 to 0.98 mm", "0.38 to 0.98 mm", "nothing to do"),
    "W_FILLED": _E("one missing slice was filled", "an isolated gap in a thin series", "a complete series", "nothing to do"),
    "W_DUP": _E("an identical slice or scan was left out", "it was exported twice", "one copy", "nothing to do"),
    "W_SAMEDAY": _E("two scans on one day", "the better one is kept", "one scan per day", "nothing to do"),
    "W_TILT": _E("tilted gantry, corrected", "slices were shifted back along their normal", "an untilted series", "nothing to do"),
    "W_PRONE": _E("prone position", "gravity moves the lung's density", "supine", "nothing to do"),
    "W_CONTRAST": _E("contrast agent", "vessels are brighter", "no contrast", "nothing to do"),
    "W_LOSSY": _E("compressed with loss", "an archive or export changed the voxels to save room", "lossless or uncompressed images", "export the series again without loss, if the archive still has it so"),
    "W_SPLIT": _E("a mixed series was split", "the best part was kept", "one geometry per series", "nothing to do"),
    "W_MASK_FOV": _E("the lung touches the image edge", "allowed by this profile", "lung inside the image", "nothing to do"),
    "W_MASK_ONELUNG": _E("one lung only", "allowed by this profile", "two lungs", "nothing to do"),
    "W_MASK_STRAY": _E("small parts of the given mask were left out", "voxels far from the lungs, marked by mistake", "parts of at least 20 ml and 1 % of the largest", "look at the picture if a part of the lung is missing, and give a corrected mask"),
    "W_THICK": _E("thick slices", "allowed by this profile", "thin slices", "nothing to do"),
    "W_AFFINE": _E("the affine step was left out", "it made the overlap worse", "an improvement", "nothing to do"),
    "W_ONE_SCAN": _E("one scan only", "used in stage 1, not for trajectories", "two or more scans", "nothing to do"),
    "W_COVARIATE": _E("a covariate is missing", "the patient stays in training and leaves the survival analysis", "age, sex and smoking", "complete the row if you can"),
    "W_HORIZON": _E("far beyond the observed times", "the model extrapolates", "times within the training window", "read the result with care"),
    "W_COMMA": _E("decimal commas or semicolons", "the table was written with another locale", "points and commas", "nothing to do"),
    "W_IDENTITY": _E("several patient ids in the headers of one patient", "the export gave each visit an id of its own; scans.csv says whose they are", "one id for all visits", "check the rows of this patient in scans.csv"),
    "W_DOUBLE_PIXELS": _E("the same pixels under two ids", "a scan was exported twice", "one id per scan", "check the ids"),
}  # fmt: skip


def wire_code_of(code: str) -> str:
    """The wire code that stands for `code` outside the site."""
    if code in WIRE_CODES:
        return code
    return CODES[code].wire if code in CODES else "INTERNAL"
