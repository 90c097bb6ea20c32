"""A folder that runs without Quadriga, with a manifest, probes and its evidence."""

from quadriga.artifact.announce import Announcement, announced
from quadriga.artifact.check import Report, load, verify
from quadriga.artifact.store import bytes_of, write

__all__ = ["Announcement", "Report", "announced", "bytes_of", "load", "verify", "write"]
