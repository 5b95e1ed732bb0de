"""The Python package etcd3 against the server at argv[1]: what programs do with it."""

import sys
import threading

import etcd3

host, port = sys.argv[1].split(":")
client = etcd3.client(host=host, port=int(port), timeout=20)


def check(holds, what):
    if not holds:
        sys.exit("not as it must be: " + what)


# Keys.
client.put("k/1", "one")
client.put("k/2", "two")
value, about = client.get("k/1")
check(value == b"one" and about.key == b"k/1" and about.version == 1, "get")
check(client.get("k/none") == (None, None), "get of nothing")
check([v for v, _ in client.get_prefix("k/")] == [b"one", b"two"], "get_prefix")
check([v for v, _ in client.get_prefix("k/", sort_order="descend")][0] == b"two", "descending")
check([v for v, _ in client.get_range("k/1", "k/2")] == [b"one"], "get_range")
check(client.put("k/1", "uno", prev_kv=True).prev_kv.value == b"one", "prev_kv")
check(client.replace("k/1", "uno", "eins"), "replace")
check(not client.replace("k/1", "uno", "un"), "replace of another value")
check(client.put_if_not_exists("k/3", "three"), "put_if_not_exists")
check(not client.put_if_not_exists("k/3", "drei"), "put_if_not_exists twice")
check(client.delete("k/3"), "delete")
check(not client.delete("k/3"), "delete of nothing")

# Transactions.
done, answers = client.transaction(
    compare=[
        client.transactions.value("k/1") == "eins",
        client.transactions.version("k/2") > 0,
        client.transactions.create("k/none") == 0,
    ],
    success=[client.transactions.put("k/1", "ichi"), client.transactions.get("k/1")],
    failure=[client.transactions.delete("k/1")],
)
check(done and answers[1][0][0] == b"ichi", "transaction")
done, _ = client.transaction(
    compare=[client.transactions.value("k/1") == "eins"],
    success=[],
    failure=[client.transactions.delete("k/1")],
)
check(not done and client.get("k/1")[0] is None, "the other branch")

# Watches.
events, cancel = client.watch_prefix("w/")
client.put("w/1", "a")
client.delete("w/1")
first, second = next(events), next(events)
check(isinstance(first, etcd3.events.PutEvent) and first.value == b"a", "a put event")
check(isinstance(second, etcd3.events.DeleteEvent) and second.key == b"w/1", "a delete event")
cancel()
revision = client.put("w/2", "b").header.revision
past, cancel = client.watch("w/2", start_revision=revision)
check(next(past).value == b"b", "a past event")
cancel()
threading.Timer(0.1, lambda: client.put("w/3", "c")).start()
check(client.watch_once("w/3", timeout=20).value == b"c", "watch_once")

# Leases.
lease = client.lease(60)
client.put("l/1", "x", lease=lease)
check(lease.granted_ttl == 60 and 0 < lease.remaining_ttl <= 60, "time to live")
check(list(lease.keys) == [b"l/1"], "keys of a lease")
check([answer.TTL for answer in lease.refresh()] == [60], "refresh")
lease.revoke()
check(client.get("l/1") == (None, None), "revoke")

# The package's own locks: a key with a lease.
with client.lock("door", ttl=20) as lock:
    check(lock.is_acquired(), "lock")
    other = client.lock("door", ttl=20)
    check(not other.acquire(timeout=0), "a lock that is held")
check(other.acquire(timeout=20), "a lock that was released")
check(other.release(), "release")

# The cluster.
check(client.status().leader is not None, "status")
check(len(list(client.members)) == 1, "members")
check(list(client.list_alarms()) == [], "alarms")
check(client.hash() is not None, "hash")
client.compact(client.put("c", "1").header.revision)
client.defragment()
with open(sys.argv[2], "wb") as saved:
    client.snapshot(saved)
    check(saved.tell() > 0, "snapshot")
past, cancel = client.watch_prefix("c", start_revision=1)
try:
    next(past)
    sys.exit("a watch of what is compacted")
except etcd3.exceptions.RevisionCompactedError as refused:
    check(refused.compacted_revision > 1, "the compacted revision")
check(client.delete_prefix("k/").deleted == 1, "delete_prefix")
print("done")
