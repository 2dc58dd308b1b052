import sys

from gantline_devcluster.cli import main

sys.exit(main())
