"""`python -m pipelines.gallery` serves the gallery until Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Sequence

from pipelines.gallery.links import Gallery
from pipelines.gallery.server import serving

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.gallery", description=main.__doc__)
    parser.add_argument("--port", type=int, default=8377)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fault-rate", type=float, default=0.04)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    gallery = Gallery(options.port, limit=options.limit, fault_rate=options.fault_rate)
    try:
        with serving(gallery):
            links = gallery.links()
            logger.info("%d URLs on http://%s, such as %s", len(links), gallery.authority, gallery.url(*links[0]))
            threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("stopped")


if __name__ == "__main__":
    main()
