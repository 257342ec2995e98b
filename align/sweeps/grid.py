"""What a sweep varies, and the runs that this comes to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from align.maps.registry import MapType, map_type, map_types
from align.settings import Settings, check
from featstore.errors import FeatstoreError, SpecError
from featstore.store.format.elements import parse_format


@dataclass(frozen=True)
class Grid:
    """What varies; an empty axis keeps what the settings say.

    Attributes:
        types: Types of map.
        ranks: Ranks of ``lora`` and ``reduced-rank``, and of layers' own projections beside a shared map.
        formats: Element formats of the store; missing ones are converted to.
        layers: Source layers of a run, as typed after ``--layers``.
        latents: Latents of ``compress``.
        latent_dims: Widths of a latent.
    """

    types: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    latents: tuple[int, ...] = ()
    latent_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Of its directory.
        settings: What is run.
        form: Element format its store has to have; None for the store as it is.
    """

    name: str
    settings: Settings
    form: str | None = None


def parse_grid(
    *,
    types: str | None = None,
    ranks: str | None = None,
    formats: str | None = None,
    layers: str | None = None,
    latents: str | None = None,
    latent_dims: str | None = None,
) -> Grid:
    """Parse the options of `align sweep`: values with commas between, None for an axis that does not vary.

    Args:
        types: Such as ``procrustes,affine,lora``.
        ranks: Such as ``8,32``.
        formats: Such as ``int8,fp8``.
        layers: Such as ``8;16,24``: two runs, of layer 8 and of layers 16 and 24.
        latents: Such as ``8,32``.
        latent_dims: Such as ``16,64``.

    Raises:
        SpecError: An unknown type or format, a number that is none, a value twice, or an empty one.
    """
    found = Grid(
        tuple(_values("--types", types)),
        tuple(_number("--ranks", value) for value in _values("--ranks", ranks)),
        tuple(_values("--formats", formats)),
        tuple(_values("--layers", layers, ";")),
        tuple(_number("--latents", value) for value in _values("--latents", latents)),
        tuple(_number("--latent-dims", value) for value in _values("--latent-dims", latent_dims)),
    )
    known = [type_.name for type_ in map_types()]
    for type_ in found.types:
        if type_ not in known:
            raise SpecError(f"--types {type_!r}: choose among {', '.join(known)}")
    for form in found.formats:
        parse_format(form)
    return found


def _values(option: str, text: str | None, separator: str = ",") -> list[str]:
    if text is None:
        return []
    values = [value.strip() for value in text.split(separator)]
    if "" in values:
        raise SpecError(f"{option} {text!r}: write values with {separator!r} between them and nothing else")
    for value in values:
        if values.count(value) > 1:
            raise SpecError(f"{option} {text!r}: {value} stands there twice; give every value once")
    return values


def _number(option: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 10 and int(value) > 0):
        raise SpecError(f"{option} {value!r}: write positive whole numbers, such as 8,32")
    return int(value)


def cells(settings: Settings, grid: Grid) -> list[Cell]:
    """Every run of a sweep, each once: an axis that means nothing to a type does not multiply it.

    Args:
        settings: What all runs share; ``store`` is the one that formats are converted from.
        grid: What varies.

    Raises:
        SpecError: An invalid run, or an axis that no type of the grid uses.
    """
    found: dict[str, Cell] = {}
    types = [map_type(name) for name in grid.types or (settings.type,)]
    for option, axis, users in (
        ("--ranks", grid.ranks, [type_ for type_ in types if _ranked(type_, settings)]),
        ("--latents", grid.latents, [type_ for type_ in types if "latents" in type_.options]),
        ("--latent-dims", grid.latent_dims, [type_ for type_ in types if "latent_dim" in type_.options]),
    ):
        if axis and not users:
            names = ", ".join(type_.name for type_ in types)
            raise SpecError(f"{option} {','.join(map(str, axis))}: no type of {names} has any; leave it out")
    axes = ((axis or (None,)) for axis in (grid.layers, grid.ranks, grid.latents, grid.latent_dims))
    for type_, (layers, rank, latents, dim), form in product(types, product(*axes), grid.formats or (None,)):
        loop, words = settings.loop, [type_.name]
        if type_.name != settings.type and "skip" in type_.defaults:
            # As in `align train`: where nobody names a skip, the type's own default counts.
            loop = replace(loop, skip=type_.defaults["skip"])
        if layers is not None:
            words.append(f"L{str(layers).replace('%', 'pc').replace(',', '+').replace(' ', '')}")
        if rank is not None and _ranked(type_, settings):
            loop, words = replace(loop, rank=int(rank)), [*words, f"r{rank}"]
        if latents is not None and "latents" in type_.options:
            loop, words = replace(loop, latents=int(latents)), [*words, f"m{latents}"]
        if dim is not None and "latent_dim" in type_.options:
            loop, words = replace(loop, latent_dim=int(dim)), [*words, f"d{dim}"]
        own = replace(settings, type=type_.name, loop=loop, layers=settings.layers if layers is None else str(layers))
        if form is not None:
            words.append(form)
        name = "-".join(words)
        try:
            check(own)
        except FeatstoreError as error:
            raise SpecError(f"cell {name}: {error}") from error
        found.setdefault(name, Cell(name, own, form))
    return list(found.values())


def _ranked(type_: MapType, settings: Settings) -> bool:
    """Whether a rank means something to a type: of its maps, or of layers' projections beside a shared map."""
    return "rank" in type_.options or settings.shared
