import sys

from oar_scale.cli import main

sys.exit(main())
