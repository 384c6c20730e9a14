"""The programs of README and documentation meant for a virtual machine, run as printed in one, with a server on its host."""

from __future__ import annotations

import pytest

from nbdcore.server import MemoryDisk, Server
from tests.test_docs import PAGES, Block, blocks, name_of
from tests.vm import printed
from tests.vm.guest import Guest

pytestmark = [pytest.mark.vm, pytest.mark.xdist_group("vm")]

PROGRAMS = [
    pytest.param(block, id=name_of(page))
    for page in PAGES
    for block in blocks(page)
    if block.comment == "not run: needs a virtual machine around it" and block.language == "python"
]


def test_there_are_such_programs() -> None:
    assert PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_guest_runs_the_printed_program_and_sees_the_disk_of_its_host(guest: Guest, program: Block) -> None:
    disk = MemoryDisk(64 << 20)
    with Server(disk) as server:
        server.listen("unix", path=guest.host_socket(10809))
        assert guest.call(printed.run, source=program.text).startswith(f"{disk.size}")
