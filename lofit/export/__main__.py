"""`python -m lofit.export`: see formats.py."""

from lofit import errors
from lofit.export.formats import main

errors.run(main)
