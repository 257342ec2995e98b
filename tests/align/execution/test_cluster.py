"""A scheduler that is there already: over TLS, or plain with a line that says so."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import align.execution.cluster as module
from align.execution.choice import executor
from align.execution.cluster import Cluster
from align.execution.options import Execution
from align.execution.processes import Processes
from align.execution.threads import Threads
from featstore.errors import SpecError, WorkersError

LOCAL: dict[str, Any] = {"n_workers": 1, "processes": False, "threads_per_worker": 2}


def certificate(folder: Path, name: str, *, ca: Path | None = None) -> tuple[Path, Path]:
    """A certificate and its key, signed by an authority or by itself."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    signer = [] if ca is None else ["-CA", str(ca), "-CAkey", str(ca.with_suffix(".key"))]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert), *signer],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A scheduler that talks to those alone who show a certificate of its authority."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made by openssl")
    from distributed import LocalCluster
    from distributed.security import Security

    folder = tmp_path_factory.mktemp("tls")
    ca, _ = certificate(folder, "ca")
    cert, key = certificate(folder, "node", ca=ca)
    files = {"tls_ca_file": str(ca), "require_encryption": True}
    for role in ("scheduler", "worker", "client"):
        files |= {f"tls_{role}_cert": str(cert), f"tls_{role}_key": str(key)}
    options = {
        "dashboard_address": "127.0.0.1:0",
        "protocol": "tls",
        "host": "127.0.0.1",
        "security": Security(**files),
    }
    with LocalCluster(**LOCAL, **options) as cluster:
        yield SimpleNamespace(address=cluster.scheduler_address, ca=ca, cert=cert, key=key, folder=folder)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCHEDULER_SECONDS", 0.5)


def test_certificates_open_a_scheduler(
    secure: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_text(secure.cert.read_text() + secure.key.read_text())
    for cert, key in ((secure.cert, secure.key), (both, None)):
        # Without a scheme, TLS is meant.
        for address in (secure.address, secure.address.removeprefix("tls://")):
            with executor(Execution(None, address, secure.ca, cert, key)) as workers:
                assert workers.submit(pow, 3, 4).result() == 81
    assert "plain" not in capsys.readouterr().err


def test_dasks_own_configuration_is_respected(secure: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    import dask.config

    own = {"ca-file": secure.ca, "client.cert": secure.cert, "client.key": secure.key}
    own = {f"distributed.comm.tls.{name}": str(path) for name, path in own.items()}
    with dask.config.set(own), executor(Execution(scheduler=secure.address)) as workers:
        assert workers.submit(pow, 3, 4).result() == 81
    assert "plain" not in capsys.readouterr().err


def test_who_shows_no_certificate_of_its_authority_is_turned_away(secure: SimpleNamespace, short: None) -> None:
    stranger, key = certificate(secure.folder / "stranger", "stranger")
    with pytest.raises(SpecError, match=r"--scheduler tls://.*: no Dask scheduler answers there .*TLS"):
        executor(Execution(scheduler=secure.address)).__enter__()
    for files in ((secure.ca, stranger, key), (stranger, stranger, key)):
        with pytest.raises(SpecError, match=r"--scheduler tls://.*: no Dask scheduler answers there .*"):
            executor(Execution(None, secure.address, *files)).__enter__()


def test_files_that_are_no_certificates_are_named(secure: SimpleNamespace, tmp_path: Path) -> None:
    words = tmp_path / "words.pem"
    words.write_text("no certificate")
    with pytest.raises(SpecError, match=r"none.pem cannot be read \(No such file or directory\)"):
        executor(Execution(None, secure.address, secure.ca, tmp_path / "none.pem", secure.key)).__enter__()
    for files in ((words, secure.cert, secure.key), (secure.ca, words, secure.key), (secure.ca, secure.cert, words)):
        with pytest.raises(SpecError, match=r"words.pem.*: no certificate with its key, or not in PEM form"):
            executor(Execution(None, secure.address, *files)).__enter__()


def test_a_plain_connection_is_called_so_and_a_dashboard_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from distributed import LocalCluster

    with LocalCluster(**LOCAL, dashboard_address="127.0.0.1:0", protocol="tcp") as cluster:
        with executor(Execution(scheduler=cluster.scheduler_address)) as workers:
            assert workers.width == 2
            plain, dashboard = capsys.readouterr().err.splitlines()
        with executor(Execution(scheduler=cluster.scheduler_address), quiet=True):
            assert capsys.readouterr().err == ""
        assert plain == (
            f"the connection to the Dask scheduler at {cluster.scheduler_address} is plain: whoever reaches that port "
            "can run code as the owner of its workers; use tls:// with --tls-ca, --tls-cert and --tls-key"
        )
        assert dashboard.startswith("Dask dashboard: http://127.0.0.1:")
        with urllib.request.urlopen(dashboard.split()[-1], timeout=10) as answer:
            assert answer.status == 200


def test_a_scheduler_may_wait_for_workers(capsys: pytest.CaptureFixture[str]) -> None:
    from distributed import LocalCluster

    with LocalCluster(**{**LOCAL, "n_workers": 0}, dashboard_address="127.0.0.1:0", protocol="tcp") as cluster:
        with executor(Execution(scheduler=cluster.scheduler_address)) as workers:
            assert workers.width == 0
        line = f"the Dask scheduler at {cluster.scheduler_address} has no workers yet: waiting for them"
        assert line in capsys.readouterr().err.splitlines()


def test_lost_workers_and_schedulers_are_one_clear_line() -> None:
    from concurrent.futures import CancelledError

    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    class Losing:
        key = "task"

        def __init__(self, error: Exception) -> None:
            self.error = error

        def submit(self, *_: object, **__: object) -> Losing:
            return self

        def result(self) -> None:
            raise self.error

        def exception(self) -> Exception:
            return self.error

    killed = KilledWorker("sum_run", SimpleNamespace(address="tcp://x"), 3)
    task = Cluster(Losing(killed)).submit(len, "")
    with pytest.raises(WorkersError, match=r"workers died over the same task .* run fewer workers$"):
        task.result()
    assert str(task.exception()).startswith("workers died over the same task again and again")
    for error in (CancelledError("sum_run"), CommClosedError("closed"), TimeoutError()):
        with pytest.raises(WorkersError, match=r"the Dask scheduler went away .*; start it and run again$"):
            Cluster(Losing(error)).submit(len, "").result()


def test_options_choose_the_executor(short: None) -> None:
    with executor(Execution()) as threads:
        assert isinstance(threads, Threads)
    with executor(Execution(workers=2)) as processes:
        assert isinstance(processes, Processes)
        assert processes.width == 2
    with pytest.raises(SpecError, match=r"--scheduler tcp://127.0.0.1:1: no Dask scheduler answers there"):
        executor(Execution(scheduler="tcp://127.0.0.1:1")).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "--workers 0: must be at least 1"),
        ({"workers": 2, "scheduler": "tcp://x"}, "--workers 2: the scheduler at tcp://x has its own; leave it out"),
        ({"tls_ca": Path("a")}, "--tls-ca is of a Dask scheduler; name it by --scheduler"),
        ({"scheduler": "tls://x", "tls_ca": Path("a")}, "--tls-ca: a TLS connection needs --tls-cert as well"),
        ({"scheduler": "x:1", "tls_key": Path("a")}, "--tls-key: a TLS connection needs --tls-ca as well"),
        (
            {"scheduler": "tcp://x:1", "tls_ca": Path("a"), "tls_cert": Path("b")},
            "--tls-ca: --scheduler tcp://x:1 is a plain address; write tls://host:port",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        Execution(**options)
    assert str(caught.value) == words
