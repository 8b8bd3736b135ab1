"""Tiled: the embedded catalogue, the writers of raw and derived runs, the server."""

from nanobeam_bluesky.tiled_adapters.catalog import open_catalog
from nanobeam_bluesky.tiled_adapters.server import serve, serve_config
from nanobeam_bluesky.tiled_adapters.writers import derived_writer, raw_writer

__all__ = ["derived_writer", "open_catalog", "raw_writer", "serve", "serve_config"]
