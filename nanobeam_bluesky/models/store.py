"""`ModelStore`: trained networks on disk, found by the fingerprint of their geometry."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from nanobeam_bluesky.geometry import Geometry
from nanobeam_bluesky.models.networks import ARCHITECTURES, outputs

__all__ = ["Accuracy", "Card", "ModelNotFoundError", "ModelRefusedError", "ModelStore"]


class ModelNotFoundError(LookupError):
    """No network is stored for a geometry."""


class ModelRefusedError(ValueError):
    """Stored weights that are not what they should be."""


class Accuracy(BaseModel):
    """Errors of a network on patterns between grid points that it was not trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    counts: float
    """Mean counts of a pattern, e.g. 4300."""
    rmse: dict[str, float]
    """Root mean square error of strain, omega (deg) and chi (deg), and of thickness (nm)
    where it has a range."""
    bias: dict[str, float]
    """Mean error."""
    bound: dict[str, float]
    """Root mean square of the Cramér-Rao bound."""


class Card(BaseModel):
    """What a stored network is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """Of the geometry."""
    geometry: Geometry
    """The geometry it was trained for."""
    architecture: str
    """Name of the network, a key of `networks.ARCHITECTURES`."""
    ranges: dict[str, float]
    """Half-ranges of strain, omega (deg) and chi (deg) in training; of thickness (nm), around
    the geometry's, where it is a fourth output."""
    training: dict[str, Any]
    """Settings of the training."""
    accuracy: tuple[Accuracy, ...]
    """At several count levels, increasing."""
    version: str
    """Of this package."""
    created: str
    """Date, ISO 8601."""
    sha256: str = ""
    """Of the weights' file; filled by the store."""


class ModelStore:
    """Networks in a folder.

    Parameters
    ----------
    root
        The folder; ``$NANOBEAM_HOME/models``, or the platform's data folder, if absent.

    Notes
    -----
    A network is two files: ``<fingerprint>.safetensors`` and ``<fingerprint>.json``, its
    `Card`.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        home = os.environ.get("NANOBEAM_HOME") or user_data_path("nanobeam")
        self.root = Path(root) if root is not None else Path(home) / "models"

    def paths(self) -> dict[str, Path]:
        """Cards' files by fingerprint."""
        return {path.stem: path for path in sorted(self.root.glob("*.json"))}

    def find(self, prefix: str) -> str:
        """Return the one fingerprint that begins with some hex digits.

        Raises
        ------
        ModelNotFoundError
            If there is none, or more than one.
        ValueError
            If the prefix is not made of hex digits.
        """
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise ValueError(f"{prefix!r} is no fingerprint: expected up to 16 hex digits")
        found = [name for name in self.paths() if name.startswith(prefix)]
        if len(found) != 1:
            what = f"several networks: {', '.join(found)}" if found else "no network"
            raise ModelNotFoundError(
                f"{prefix} is the beginning of {what}; 'nanobeam models list' shows all"
            )
        return found[0]

    def card(self, fingerprint: str) -> Card:
        """Return a network's card.

        Raises
        ------
        ModelNotFoundError, ModelRefusedError
            If there is none, or if it cannot be read.
        """
        return self._card(self._path(fingerprint))

    def verify(self, fingerprint: str) -> Card:
        """Check a network as `load` would, and that its files have its geometry's name.

        Raises
        ------
        ModelNotFoundError, ModelRefusedError
            If there is none, or if it is not sound.
        """
        path = self._path(fingerprint)
        card = self._card(path)
        if card.geometry.fingerprint() != fingerprint or card.fingerprint != fingerprint:
            raise ModelRefusedError(
                f"{path}: its card describes geometry {card.geometry.fingerprint()} and says "
                f"{card.fingerprint[:40]}, expected {fingerprint}"
            )
        return self._load(path, card.geometry)[1]

    def save(self, network: nn.Module, card: Card) -> Card:
        """Write weights and card; replaces what was stored for the geometry."""
        weights = save({k: v.detach().cpu().contiguous() for k, v in _state(network).items()})
        card = card.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest()})
        self.root.mkdir(parents=True, exist_ok=True)
        _write(self.root / f"{card.fingerprint}.safetensors", weights)
        _write(self.root / f"{card.fingerprint}.json", card.model_dump_json(indent=1).encode())
        return card

    def load(self, geometry: Geometry) -> tuple[nn.Module, Card]:
        """Return the network of a geometry, in evaluation mode, and its card.

        Raises
        ------
        ModelNotFoundError
            If there is none.
        ModelRefusedError
            If the files are damaged, altered, of an unknown architecture, or of another
            geometry than their name says.
        """
        fingerprint = geometry.fingerprint()
        path = self.root / f"{fingerprint}.json"
        if path.is_file():
            return self._load(path, geometry)
        raise ModelNotFoundError(
            f"no network is trained for geometry {fingerprint}: looked in {self.root}; train one "
            "with 'nanobeam train'"
        )

    def remove(self, fingerprint: str) -> None:
        """Delete a network.

        Raises
        ------
        ModelNotFoundError
            If there is none.
        """
        path = self._path(fingerprint)
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)

    def _path(self, fingerprint: str) -> Path:
        # looked up, not made of the name: no name leads out of the folders
        paths = self.paths()
        if fingerprint not in paths:
            raise ModelNotFoundError(f"no network {fingerprint!r} in {self.root}")
        return paths[fingerprint]

    def _card(self, path: Path) -> Card:
        try:
            return Card.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            raise ModelRefusedError(f"{path}: not a model card: {error}") from None

    def _load(self, path: Path, geometry: Geometry) -> tuple[nn.Module, Card]:
        card = self._card(path)
        if card.geometry.fingerprint() != geometry.fingerprint():
            raise ModelRefusedError(
                f"{path}: its card describes geometry {card.geometry.fingerprint()}, "
                f"expected {geometry.fingerprint()}; train again with 'nanobeam train'"
            )
        if card.architecture not in ARCHITECTURES:
            raise ModelRefusedError(
                f"{path}: unknown architecture {card.architecture!r}; "
                f"known are {', '.join(ARCHITECTURES)}"
            )
        weights = path.with_suffix(".safetensors")
        try:
            content = weights.read_bytes()
            if hashlib.sha256(content).hexdigest() != card.sha256:
                raise ModelRefusedError(
                    f"{weights}: altered or truncated (its hash is not the card's); "
                    "train again with 'nanobeam train'"
                )
            network = ARCHITECTURES[card.architecture](
                geometry.pattern_shape,
                thickness_nm=geometry.thickness_nm if "thickness" in card.ranges else None,
            )
            network.load_state_dict(load(content))
        except (OSError, SafetensorError) as error:
            raise ModelRefusedError(f"{weights}: {error}") from None
        except (RuntimeError, ValueError) as error:
            raise ModelRefusedError(
                f"{weights}: not weights of {card.architecture} for patterns of "
                f"{geometry.pattern_shape} pixels and {outputs(card.ranges)}: {error}"
            ) from None
        return network.eval(), card


def _state(network: nn.Module) -> Mapping[str, Tensor]:
    state: Mapping[str, Tensor] = network.state_dict()
    return state


def _write(path: Path, content: bytes) -> None:
    """Replace a file; never half of one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.write_bytes(content)  # readable as the umask says, unlike a temporary file
        os.replace(part, path)
