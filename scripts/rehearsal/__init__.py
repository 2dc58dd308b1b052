"""`make rehearsal`: from the Dockerfile to the last `helm uninstall`, on a node of one's own. `__main__.py` says how."""
