"""Faults of processes, and stores."""

ROWS = {
    "remote/fetching.py": [
        ("what is damaged in the cache is used", "path.stat().st_size == one.size and self._digest(path) == one.digest",
         "path.stat().st_size > 0"),
        ("all processes fetch", "with filelock.FileLock(one.path.with_name(f\".{one.path.name}.lock\")):", "if True:"),
    ],
    "remote/store.py": [
        ("a lost answer is a refusal", "return lease.is_of(content)", "return False"),
        ("any lease is ours", '["token"] == self.token', '["token"] is not None'),
    ],
    "remote/mirror.py": [
        ("a checkpoint's seal before its numbers", 'return 2 if name.endswith(f"/{SEAL}") else 1', "return 1"),
        ("a result before its checkpoint", 'return 3 if name.rpartition("/")[2] in LAST else 0', "return 0"),
        ("checkpoints that are not whole are fetched", '+ "/" in steps', '+ "/" is not None'),
        ("what is written here is overwritten", "mark) and not self._changed(name)", "mark)"),
        ("no checkpoint while newer ones go up", "self._forget(early)", "self._forget(seals)"),
        ("leases never expire", "is None or age <= EXPIRES", "is None or age <= 2**60"),
        ("leases by this machine's clock", "time.monotonic() + self._clock - modified", "time.time() - modified"),
        ("a run that was taken over is uploaded", "not _hidden(name) and not self._is_lost(name)", "not _hidden(name)"),
        ("who stood still does not look", "lease.renewed > EXPIRES / 2 for", "lease.renewed > 2**60 for"),
        ("leases are not renewed", '("renew", EXPIRES / 4)', '("renew", 2**30)'),
        ("the store keeps what went here", "self._forget(name for name in gone if not name.endswith(SEAL))", "pass"),
    ],
    "watch.py": [
        ("a silent coordinator is not to blame", "min(silent) if len(silent) == len(views) - 1 else max(", "max("),
        ("the silent are blamed late", "if blamed and not silent:", "if False:"),
        ("who waits for the others is to blame", " if not view.waits}", "}"),
        ("who was stopped has failed", "not in (0, STOPPED)}", "!= 0}"),
        ("a stop is not waited for", "now - self._asked > self._grace and", "now - self._asked > 0 and"),
        ("a stop is waited for without end", "now - self._asked > self._grace and", "now - self._asked > 2**30 and"),
        ("who stood still itself blames the others", "self._awake = now\n", "pass\n"),
        ("who fails waits without end", "if self.failed and not", "if False and not"),
        ("saves count as steps", "_since += time.monotonic() - begun", "pass"),
        ("Python ends before the watch", "atexit.register(self.end)", "pass"),
        ("the watch tells on after its end", "        self._ends.set()\n", ""),
    ],
    "cluster.py": [
        ("a node's only task takes one GPU", "if tasks < 2 or", "if tasks < 1 or"),
        ("a slice begins where the first does", "number * len(hosts) + worker", "worker"),
        ("loopback across hosts", "(found.hosts or 1) > 1 and loopback", "False and loopback"),
        ("JAX chooses the GPUs", 'cluster_detection_method="deactivate"', "cluster_detection_method=None"),
    ],
}  # fmt: skip
