"""The store: jobs, artifacts, events, keys and endpoints that last; all queries live here."""

from llmo.store.blobs import Blobs
from llmo.store.catalog import Catalog
from llmo.store.endpoints import Endpoints
from llmo.store.events import Events
from llmo.store.jobs import Jobs
from llmo.store.keys import Keys
from llmo.store.store import Store

__all__ = ["Blobs", "Catalog", "Endpoints", "Events", "Jobs", "Keys", "Store"]
