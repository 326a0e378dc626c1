import sys

from ducto_pg.cli import main

sys.exit(main())
