"""The in-process grid behaves as the network does: own copies, named sites, lost sites, no text of an exception."""

from __future__ import annotations

import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fourdvq_server.local_grid import LocalGrid


def echo(message, context):
    record = message.content.config_records["c"]
    record["seen"] = f"{context.node_config['site']} {record['text']}"
    return Message(message.content, reply_to=message)


def ask(grid, names, text="hi"):
    nodes = {n.name: n.node_id for n in grid.get_nodes()}
    shared = RecordDict({"c": ConfigRecord({"text": text})})
    replies = grid.send_and_receive([Message(shared, nodes[n], "query.x") for n in names], timeout=10)
    return shared, replies


def test_each_site_answers_under_its_name_on_its_own_copy():
    with LocalGrid({"leuven": echo, "southampton": echo}) as grid:
        shared, replies = ask(grid, ["leuven", "southampton"])
        seen = sorted(r.content.config_records["c"]["seen"] for r in replies)
    assert seen == ["leuven hi", "southampton hi"]
    assert "seen" not in shared.config_records["c"]


def test_an_offline_site_is_not_listed_and_asking_it_gives_the_error_of_a_lost_node():
    with LocalGrid({"leuven": echo, "southampton": echo}) as grid:
        nodes = {n.name: n.node_id for n in grid.get_nodes()}
        grid.offline.add("leuven")
        assert [n.name for n in grid.get_nodes()] == ["southampton"]
        [reply] = grid.send_and_receive([Message(RecordDict(), nodes["leuven"], "query.x")], timeout=10)
    assert reply.has_error()
    assert reply.error.code == 5


def test_of_an_exception_only_the_class_name_leaves():
    def broken(message, context):
        raise ValueError("patient LEU-004217")

    with LocalGrid({"leuven": broken}) as grid:
        _, [reply] = ask(grid, ["leuven"])
    assert (reply.error.code, reply.error.reason) == (2, "ValueError")


@pytest.mark.parametrize(("one_at_a_time", "together"), [(True, 1), (False, 2)])
def test_sites_work_side_by_side_unless_told_otherwise(one_at_a_time, together):
    busy, most, lock = [0], [0], threading.Lock()

    def slow(message, context):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.2)
        with lock:
            busy[0] -= 1
        return Message(message.content, reply_to=message)

    with LocalGrid({"leuven": slow, "southampton": slow}, one_at_a_time=one_at_a_time) as grid:
        ask(grid, ["leuven", "southampton"])
    assert most[0] == together


def test_closing_ends_the_threads():
    before = threading.active_count()
    grid = LocalGrid({"leuven": echo, "southampton": echo})
    grid.close()
    assert threading.active_count() == before
