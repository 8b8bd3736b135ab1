"""Stored runs: found by queries or made of plain files, analysed, compared and combined."""
