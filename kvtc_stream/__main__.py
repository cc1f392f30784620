"""``python -m kvtc_stream`` is the command ``kvtc``."""

import sys

from kvtc_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
