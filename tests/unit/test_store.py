"""A kill at any moment leaves what was finished; what is damaged is not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourdvq.errors import ConfigError, ModelError, TemporaryStop
from fourdvq.plan import Plan
from fourdvq.wire.body import body_sha256
from fourdvq.wire.messages import PROTOCOL, ReplyEnvelope, VqganTask, VqganUpdate
from fourdvq_server.journal import Journal
from fourdvq_server.store import Control, create_store, open_store

PLAN = Plan(name="t", profile_sha256="a" * 64)
WEIGHTS = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def store(tmp_path):
    return create_store(tmp_path / "r", PLAN, {"profile": {"name": "p"}}, {"version": "0.1.0"})


@pytest.fixture
def stage(store):
    stage = store.stage("vqgan")
    stage.write_round(1, {"weights": WEIGHTS, "server_state": {}}, {"note": "first"})
    stage.write_round(2, {"weights": {n: t + 1 for n, t in WEIGHTS.items()}, "server_state": {}}, {"note": "second"})
    return stage


def test_a_round_comes_back_as_it_was_written(stage):
    record = stage.read_round(1)
    assert record.facts == {"note": "first"}
    assert record.tensors["server_state"] == {}
    for name, tensor in WEIGHTS.items():
        assert record.tensors["weights"][name].dtype == tensor.dtype
        assert torch.equal(record.tensors["weights"][name], tensor)


@pytest.mark.parametrize("file", ["weights.safetensors", "round.json", "complete"])
def test_any_changed_byte_sends_the_run_back_to_the_round_before(stage, file):
    path = stage.folder / "round-0002" / file
    size = path.stat().st_size
    for at in np.linspace(0, size - 1, 16).astype(int):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(bytes(data))
        last, damaged = stage.last_round()
        assert last is not None
        assert last.number == 1, f"byte {at} of {size}"
        assert len(damaged) == 1
        assert "E_CHECKPOINT" in damaged[0]
        data[at] ^= 0x10
        path.write_bytes(bytes(data))
    assert stage.last_round()[0].number == 2


@pytest.mark.parametrize("file", ["weights.safetensors", "round.json", "complete"])
def test_a_missing_file_makes_the_round_incomplete(stage, file):
    (stage.folder / "round-0002" / file).unlink()
    assert stage.last_round()[0].number == 1
    with pytest.raises(ModelError, match="E_CHECKPOINT"):
        stage.read_round(2)


def test_what_a_killed_writer_left_is_no_round_and_is_replaced(stage):
    left = stage.folder / ".tmp-round-0003-1"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    (stage.folder / "round-0003").mkdir()
    assert stage.last_round()[0].number == 2
    stage.write_round(3, {"weights": WEIGHTS}, {})
    assert stage.last_round()[0].number == 3


def test_a_stage_is_done_only_with_a_sound_result_and_newest_round(stage):
    assert not stage.is_done
    stage.finish({"rounds": 2})
    assert stage.is_done
    assert stage.result == {"rounds": 2}
    path = stage.folder / "round-0002" / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert not stage.is_done
    path.write_bytes(data)
    (stage.folder / "result.json").write_text("{}")
    assert not stage.is_done


def test_wire_rounds_grow_over_restarts(tmp_path, store):
    assert [store.next_wire_round() for _ in range(2)] == [1, 2]
    assert open_store(tmp_path / "r").next_wire_round() == 3


def test_control_is_what_was_asked_last(tmp_path, store):
    assert store.control == Control()
    store.set_control(Control(pause=True))
    assert open_store(tmp_path / "r").control == Control(pause=True)


def test_a_second_process_is_refused_while_one_holds_the_run(tmp_path, store):
    other = open_store(tmp_path / "r")
    assert not other.is_running
    with store.locked():
        assert other.is_running
        with pytest.raises(TemporaryStop, match="E_BUSY"), other.locked():
            pass
    with other.locked():
        pass


def test_a_run_folder_keeps_its_plan(tmp_path, store):
    assert open_store(tmp_path / "r").plan == PLAN
    with pytest.raises(ConfigError, match="E_EXISTS"):
        create_store(tmp_path / "r", Plan(name="other", profile_sha256="a" * 64), {}, {})
    with pytest.raises(ConfigError, match="E_RUN"):
        open_store(tmp_path / "none")


def test_a_metric_is_written_once_per_round_and_site(tmp_path, store):
    for _ in range(2):
        store.metrics.append("vqgan", 1, "leuven", {"loss": 0.5})
    again = open_store(tmp_path / "r")
    again.metrics.append("vqgan", 1, "leuven", {"loss": 0.5})
    again.metrics.append("vqgan", 1, "", {"loss": 0.5})
    assert [(line["site"], line["values"]) for line in again.metrics.lines()] == [
        ("leuven", {"loss": 0.5}),
        ("", {"loss": 0.5}),
    ]


def reply() -> tuple[VqganTask, ReplyEnvelope, VqganUpdate]:
    codes = {"codes": np.zeros((2, 1), np.float32), "code_counts": np.ones(2), "code_sums": np.ones((2, 1))}
    task = VqganTask(steps=1, global_step=0, discriminator=False, weights=WEIGHTS, **codes)
    body = VqganUpdate(
        delta=WEIGHTS, code_counts=np.array([1.0, 2.0]), code_sums=np.ones((2, 1)), scans=3, losses={"loss": 0.25}
    )
    envelope = ReplyEnvelope(PROTOCOL, "r", 4, "0" * 32, "b" * 64, "c" * 64, "leuven", body_sha256(body), "d" * 64, 0.0)
    return task, envelope, body


def test_a_journaled_reply_comes_back_with_the_same_content(tmp_path):
    task, envelope, body = reply()
    journal = Journal(tmp_path)
    journal.write("train.vqgan", envelope, body, 77)
    kept = journal.read("leuven", task, plan="b" * 64, parent="c" * 64)
    assert kept is not None
    assert kept.envelope == envelope
    assert body_sha256(kept.body) == envelope.payload_sha256
    assert kept.bytes_up == 77


def test_a_journaled_reply_to_another_question_or_a_damaged_one_is_not_used(tmp_path):
    task, envelope, body = reply()
    journal = Journal(tmp_path)
    journal.write("train.vqgan", envelope, body, 77)
    assert journal.read("leuven", task, plan="e" * 64, parent="c" * 64) is None
    assert journal.read("leuven", task, plan="b" * 64, parent="e" * 64) is None
    assert journal.read("southampton", task, plan="b" * 64, parent="c" * 64) is None
    path = tmp_path / "leuven.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert journal.read("leuven", task, plan="b" * 64, parent="c" * 64) is None
