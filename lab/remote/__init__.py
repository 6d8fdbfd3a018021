"""Directories in object stores, s3:// and gs://: the objects (store), and a copy that is worked on (mirror).

Nothing here is imported, and no library of a store, unless a path of one is given: `lab.storage` is the door.
"""
