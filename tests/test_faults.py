"""A run that is ended at any moment and started again comes to the same plan, and training ends."""

import random
import signal

import pytest

from tests.faults import FAULTS, Laboratory, ended_by, row, rows_of, table

MOMENTS = 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", range(MOMENTS))
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_ended_at_a_random_moment(lab, kind, number):
    ended_by(kind)(lab, lab.folder / f"{kind}-{number}", random.Random(f"{kind} {number}"))


@pytest.mark.parametrize("name", [name for name in FAULTS if "random moment" not in name])
def test_every_other_fault_once(lab, name):
    FAULTS[name][0](lab, lab.folder / str(list(FAULTS).index(name)), random.Random(1))


def test_table_tells_what_was_lost():
    rows = {"a": row([("early", ""), ("early", ""), ("late", "")]), "b": row([("lost", "another plan")])}
    lines = table(rows).splitlines()
    assert lines[2:] == ["| a | 3 | 3 | 2 early; 1 late |", "| b | 1 | 0 | 1 lost |", "| **all** | **4** | **3** | |"]
    assert rows_of(table(rows)) == rows
