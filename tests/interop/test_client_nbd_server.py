from __future__ import annotations

import pytest

import nbdcore
from tests.interop.images import pattern, raw_image
from tests.interop.programs import version_of
from tests.interop.servers import nbd_server

TIMEOUT = 20
MiB = 1 << 20

pytestmark = pytest.mark.interop("nbd-server")

#: The first nbd-server that has them.
WITH_STRUCTURED_REPLIES = (3, 26)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_reference_server_reads_and_writes_with_the_best_replies_that_both_have(tmp_path, tcp, structured):
    data = pattern(3 * MiB)
    image = raw_image(tmp_path / "disk.raw", 8 * MiB, {MiB: data})
    features = {"flush": "true", "fua": "true", "trim": "true"}
    with (
        nbd_server({"disk": image}, tcp=tcp, options=features) as server,
        nbdcore.connect(server.uri, timeout=TIMEOUT, structured_replies=structured) as disk,
    ):
        assert disk.structured_replies == (structured and version_of("nbd-server") >= WITH_STRUCTURED_REPLIES)
        assert disk.pread(len(data), MiB, timeout=TIMEOUT) == data
        disk.pwrite(b"written", 0, fua=True, timeout=TIMEOUT)
        disk.flush(timeout=TIMEOUT)
    assert image.read_bytes()[:7] == b"written"


def test_exports_are_listed_and_an_unknown_one_is_refused(tmp_path):
    image = raw_image(tmp_path / "disk.raw", MiB)
    with nbd_server({"one": image, "two": image}, general={"allowlist": "true"}) as server:
        assert {export.name for export in nbdcore.list_exports(server.uri, timeout=TIMEOUT)} == {"one", "two"}
        with pytest.raises(nbdcore.Error, match="three"):
            nbdcore.connect(server.uri_of("three"), timeout=TIMEOUT)


def test_block_status_without_contexts_says_what_is_missing(tmp_path):
    image = raw_image(tmp_path / "disk.raw", MiB)
    with (
        nbd_server({"one": image}) as server,
        nbdcore.connect(server.uri, timeout=TIMEOUT) as disk,
        pytest.raises(nbdcore.UsageError, match="base:allocation is not selected"),
    ):
        disk.extents()
