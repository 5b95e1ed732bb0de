"""Patroni's access to etcd with the servers at argv[1]: what its members ask for."""

import sys
import threading
import time

from patroni.dcs import get_dcs

PATIENCE = 20


def member(name, ttl=30):
    settings = {"name": name, "scope": "demo", "ttl": ttl, "loop_wait": 10, "retry_timeout": 10}
    return get_dcs({**settings, "etcd3": {"hosts": sys.argv[1]}})


def check(holds, what):
    if not holds:
        sys.exit("not as it must be: " + what)


def soon(what, holds):
    """What members know of each other comes to them by a watch."""
    until = time.monotonic() + PATIENCE
    while not holds():
        check(time.monotonic() < until, what)
        time.sleep(0.01)


a, b = member("a"), member("b")
cluster = a.get_cluster()
check(cluster.is_empty() or cluster.leader is None, "a new cluster")

# Who begins, and who is there.
check(a.initialize(create_new=True, sysid="1"), "initialize")
check(not b.initialize(create_new=True, sysid="2"), "initialize twice")
for dcs, name in ((a, "a"), (b, "b")):
    check(dcs.touch_member({"conn_url": "postgres://" + name, "state": "running"}), "touch_member")
soon("b knows both", lambda: {m.name for m in b.get_cluster().members} == {"a", "b"})
check(b.get_cluster().initialize == "1", "the system's id")

# One leads, and says how far it is.
check(a.attempt_to_acquire_leader(), "the first to lead")
check(not b.attempt_to_acquire_leader(), "a second leader")
soon("a sees that it leads", lambda: a.get_cluster().leader)
check(a.update_leader(a.get_cluster(), 4711, {"slot": 1}, {"a": "url"}), "update_leader")
soon("b sees how far a is", lambda: b.get_cluster().status.last_lsn == 4711)
check(b.get_cluster().leader.name == "a", "the leader")

# Configuration and state, each changed only by who knows it.
check(a.set_config_value('{"ttl":30}'), "set_config_value")
soon("b has the configuration", lambda: b.get_cluster().config)
version = b.get_cluster().config.version
check(b.set_config_value('{"ttl":40}', version), "a change of what is known")
check(not b.set_config_value('{"ttl":50}', version), "a change of what was changed")
check(a.manual_failover("a", "b"), "manual_failover")
soon("b hears of it", lambda: b.get_cluster().failover)
failover = b.get_cluster().failover
check((failover.leader, failover.candidate) == ("a", "b"), "who and to whom")
check(b.manual_failover("", "", version=failover.version), "the end of it")
check(a.set_history_value('[[1,2,"reason"]]'), "set_history_value")
sync = a.set_sync_state_value('{"leader":"a","sync_standby":"b"}')
check(sync, "set_sync_state_value")
check(not b.delete_sync_state("1"), "an old version of the synchronous state")
check(b.delete_sync_state(sync), "delete_sync_state")

# Who waits is woken when nobody leads.
soon("b hears of the leader", lambda: b.get_cluster().leader)
b.event.clear()
woken = []
waits = threading.Thread(target=lambda: woken.append(b.watch(None, PATIENCE)))
waits.start()
check(a.delete_leader(a.get_cluster().leader), "delete_leader")
waits.join()
check(woken == [True], "watch")
soon("b sees that nobody leads", lambda: not b.get_cluster().leader)
check(b.attempt_to_acquire_leader(), "the next to lead")
check(not a.attempt_to_acquire_leader(), "the one before")

# A lease that is gone takes the leader's key along; its owner finds out, and has both
# made anew: when it takes the lead, and when it goes on to lead.
def revoke_leader():
    soon("b knows its lease", lambda: b.get_cluster().leader)
    cluster = b.get_cluster()
    b._client.call_rpc("/lease/revoke", {"ID": cluster.leader.session})
    soon("nobody leads", lambda: not (a.get_cluster().leader or b.get_cluster().leader))
    return cluster


revoke_leader()
check(b.attempt_to_acquire_leader(), "to lead with a new lease")
check(b.update_leader(revoke_leader(), 4712), "to lead on with a new lease")
soon("a sees it", lambda: a.get_cluster().leader)
check(a.get_cluster().leader.name == "b", "the leader that goes on")

# A member that renews no more goes by itself.
brief = member("brief", 2)
check(brief.touch_member({"conn_url": "postgres://brief", "state": "running"}), "touch_member")
soon("a sees it", lambda: "brief" in {m.name for m in a.get_cluster().members})
soon("it goes", lambda: "brief" not in {m.name for m in a.get_cluster().members})

check(a.cancel_initialization(), "cancel_initialization")
check(a.delete_cluster(), "delete_cluster")
soon("nothing is left", lambda: b.get_cluster().is_empty())
print("done")
