"""A Django project in one file: `python manage.py migrate`, then `python manage.py charge USER_ID`."""

import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line

settings.configure(
    # Over psycopg 3; libpq takes the rest from its PG… variables.
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": os.environ["PGDATABASE"]}},
    INSTALLED_APPS=["credits"],
    USE_TZ=True,
)
execute_from_command_line(sys.argv)
