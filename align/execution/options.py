"""Where a command runs its tasks, as options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.options import POSITIVE_COUNT, check_values, option
from featstore.errors import SpecError
from featstore.runtime.options import COMPUTATION


@dataclass(frozen=True)
class Execution:
    """Workers of a command: threads, processes of this machine, or those of a Dask scheduler.

    Meaning and range of every field are declared beside it.
    """

    workers: int | None = option(
        None,
        "Number of worker processes on this machine.",
        panel=COMPUTATION,
        range=POSITIVE_COUNT,
        left_out="threads of this process; for a sweep, a process per core",
    )
    scheduler: str | None = option(
        None,
        "Address of a Dask scheduler whose workers do the work, such as tls://host:8786.",
        panel=COMPUTATION,
        left_out="none",
    )
    tls_ca: Path | None = option(  # noqa: RUF009 - a path is as immutable as a string
        None,
        "Certificate of the authority that vouches for the scheduler.",
        panel=COMPUTATION,
        left_out="as Dask is configured",
    )
    tls_cert: Path | None = option(  # noqa: RUF009
        None, "Your own certificate, which the scheduler is shown.", panel=COMPUTATION, left_out="none"
    )
    tls_key: Path | None = option(  # noqa: RUF009
        None, "Key of your own certificate.", panel=COMPUTATION, left_out="in the certificate's file"
    )

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            SpecError: Fewer than one worker, or options that do not go together.
        """
        check_values(self)
        if self.workers is not None and self.scheduler is not None:
            raise SpecError(f"--workers {self.workers}: the scheduler at {self.scheduler} has its own; leave it out")
        files = {"--tls-ca": self.tls_ca, "--tls-cert": self.tls_cert, "--tls-key": self.tls_key}
        given = [name for name, path in files.items() if path is not None]
        if given and self.scheduler is None:
            raise SpecError(f"{given[0]} is of a Dask scheduler; name it by --scheduler")
        if given and (self.tls_ca is None or self.tls_cert is None):
            missing = "--tls-ca" if self.tls_ca is None else "--tls-cert"
            raise SpecError(f"{given[0]}: a TLS connection needs {missing} as well")
        if given and "://" in str(self.scheduler) and not str(self.scheduler).startswith(("tls://", "wss://")):
            raise SpecError(f"{given[0]}: --scheduler {self.scheduler} is a plain address; write tls://host:port")
