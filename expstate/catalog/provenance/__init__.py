"""Where a take came from: small gatherers, each of one topic, run while the data is written; nothing secret passes.

``gathering`` runs them, ``gatherers`` lists them and takes users' own, ``redact`` knows what a secret looks like.
"""

from expstate.catalog.provenance.gatherers import Seen, register, unregister
from expstate.catalog.provenance.gathering import Gathering
from expstate.catalog.provenance.machine import current_user
from expstate.catalog.provenance.project import current_project

__all__ = ["Gathering", "Seen", "current_project", "current_user", "register", "unregister"]
