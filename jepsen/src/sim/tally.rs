//! What happened how often. A run that never met a fault or an operation has
//! proven nothing about it.

use std::fmt;

macro_rules! counted {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($variant,)* }

        impl $name {
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)*];

            pub(crate) fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

counted! {
    /// What is done to the system.
    Fault {
        MessageLost = "message_lost",
        MessageDoubled = "message_doubled",
        MessageDelayed = "message_delayed",
        MessageReordered = "message_reordered",
        Split = "partition_split",
        LeaderIsolated = "partition_leader",
        OneWay = "partition_one_way",
        PeerLost = "peer_lost",
        Storm = "network_storm",
        Crash = "crash",
        CrashOfLeader = "crash_leader",
        CrashOfAll = "crash_all",
        CrashDuringSync = "crash_during_sync",
        CrashDuringCheckpoint = "crash_during_checkpoint",
        CheckpointDamaged = "checkpoint_damaged",
        CheckpointsLost = "checkpoints_all_damaged",
        FetchBroken = "checkpoint_fetch_broken",
        CrashDuringFetch = "crash_during_fetch",
        CrashDuringInstall = "crash_during_install",
        LogDamaged = "log_damaged",
        Reboot = "boot_clock_reset",
        Pause = "pause",
        PauseOfLeader = "pause_leader",
        PauseOfAll = "pause_all",
        PacketsAfterPause = "packets_after_pause",
        SlowSync = "slow_sync",
        FailedSync = "failed_sync",
        CallLost = "client_call_lost",
        ReplyLost = "client_reply_lost",
        ConnectionLost = "client_connection_lost",
        ClientCut = "client_partition",
        ClientDeath = "client_death",
        ClientReturn = "client_return",
        CallRepeated = "client_call_repeated",
        StreamBroken = "stream_broken",
        ReaderSlow = "reader_slow",
    }
}

counted! {
    /// What clients completed, by its outcome.
    Operation {
        SessionOpened = "session_opened",
        SessionClosed = "session_closed",
        SessionAttached = "session_attached",
        WaitResumed = "wait_resumed",
        GrantResumed = "grant_resumed",
        OldAttachmentRefused = "old_attachment_refused",
        AnsweredAgain = "answered_again",
        Renewed = "renewed",
        SessionExpired = "session_expired",
        GrantedByTry = "granted_by_try",
        GrantedInTime = "granted_in_time",
        GrantedWithoutLimit = "granted_without_limit",
        Shared = "grant_shared",
        NotShared = "grant_not_shared",
        SharedGrantResumed = "shared_grant_resumed",
        CancelledBesideGrant = "cancelled_beside_grant",
        Held = "held",
        WaitTimedOut = "wait_timed_out",
        LostWithDelay = "lost_with_delay",
        Cancelled = "cancelled",
        Released = "released",
        ReleasedOneOfSeveral = "released_one_of_several",
        UndoneReleaseRefused = "undone_release_refused",
        StaleReleaseRefused = "stale_release_refused",
        ForceReleased = "force_released",
        Proclaimed = "proclaimed",
        StaleProclaimRefused = "stale_proclaim_refused",
        Checked = "checked",
        Listed = "listed",
        Compacted = "compacted",
        Disarmed = "disarmed",
        Get = "get",
        Put = "put",
        Delete = "delete",
        Swapped = "compare_and_put",
        SwapMissed = "compare_failed",
        KeyPut = "key_put",
        KeyDeleted = "key_deleted",
        RangeDeleted = "range_deleted",
        KeySwapped = "key_swapped",
        Txn = "txn",
        TxnInTxn = "txn_in_txn",
        TxnRefused = "txn_refused",
        RangeRead = "range_read",
        ReadPast = "range_read_past",
        ReadLocally = "range_read_locally",
        ReadInPieces = "range_read_in_pieces",
        RevisionRefused = "revision_refused",
        Compared = "compared",
        KeysCompacted = "keys_compacted",
        WatchBegun = "watch_begun",
        WatchResumed = "watch_resumed",
        WatchTold = "watch_told",
        WatchProgress = "watch_progress",
        WatchCompacted = "watch_compacted",
        WatchEnded = "watch_ended",
        WatchBehind = "watch_behind",
        WatchedAtFollower = "watched_at_follower",
        LeaseChosen = "lease_with_chosen_id",
        LeaseMade = "lease_with_made_id",
        LeaseExists = "lease_exists",
        LeaseRenewed = "lease_renewed",
        LeaseRevoked = "lease_revoked",
        LeaseOver = "lease_over",
        LeaseExpired = "lease_expired_with_keys",
        TimeLeft = "time_left",
        KeyBound = "key_bound",
        BoundInTxn = "key_bound_in_txn",
        BoundTooLate = "key_bound_too_late",
        KeysOfLease = "keys_of_lease",
        Unknown = "outcome_unknown",
        Restored = "restored_from_checkpoint",
        Installed = "installed_checkpoint",
        InstalledUnderAnother = "installed_under_another_leader",
        NoSpace = "no_space",
        IndexRebuilt = "index_rebuilt",
    }
}

/// Counts of one seed or of many.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    faults: Vec<u64>,
    operations: Vec<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            faults: vec![0; Fault::ALL.len()],
            operations: vec![0; Operation::ALL.len()],
        }
    }
}

impl Tally {
    pub(crate) fn fault(&mut self, fault: Fault) {
        self.faults[fault as usize] += 1;
    }

    pub(crate) fn operation(&mut self, operation: Operation) {
        self.operations[operation as usize] += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        let pairs = self.faults.iter_mut().zip(&other.faults);
        pairs.for_each(|(mine, theirs)| *mine += theirs);
        let pairs = self.operations.iter_mut().zip(&other.operations);
        pairs.for_each(|(mine, theirs)| *mine += theirs);
    }

    /// Faults injected; lost, doubled and late messages are the weather and not
    /// counted.
    pub(crate) fn faults(&self) -> u64 {
        let weather = [
            Fault::MessageLost,
            Fault::MessageDoubled,
            Fault::MessageDelayed,
            Fault::MessageReordered,
            Fault::CallLost,
            Fault::ReplyLost,
            Fault::CallRepeated,
            Fault::PacketsAfterPause,
            Fault::StreamBroken,
        ];
        let injected = Fault::ALL.iter().filter(|fault| !weather.contains(fault));
        injected.map(|fault| self.faults[*fault as usize]).sum()
    }

    /// Operations completed: renewals, sessions that expired, unknown outcomes,
    /// refusals for space, starts and looks at indexes do not count.
    pub(crate) fn operations(&self) -> u64 {
        let others = [
            Operation::Renewed,
            Operation::SessionExpired,
            Operation::Unknown,
            Operation::Restored,
            Operation::Installed,
            Operation::InstalledUnderAnother,
            Operation::AnsweredAgain,
            Operation::NoSpace,
            Operation::WatchTold,
            Operation::LeaseExpired,
            Operation::WatchBehind,
            Operation::WatchedAtFollower,
            Operation::IndexRebuilt,
        ];
        let completed = Operation::ALL
            .iter()
            .filter(|operation| !others.contains(operation));
        completed
            .map(|operation| self.operations[*operation as usize])
            .sum()
    }

    /// What never happened.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let faults = Fault::ALL
            .iter()
            .filter(|fault| self.faults[**fault as usize] == 0);
        let operations = Operation::ALL
            .iter()
            .filter(|operation| self.operations[**operation as usize] == 0);
        faults
            .map(|fault| fault.word())
            .chain(operations.map(|operation| operation.word()))
            .collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults = Fault::ALL
            .iter()
            .map(|fault| (fault.word(), self.faults[*fault as usize]));
        let operations = Operation::ALL
            .iter()
            .map(|operation| (operation.word(), self.operations[*operation as usize]));
        for (word, count) in faults.chain(operations) {
            write!(f, " {word}={count}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_missing_and_adds_up() {
        let mut one = Tally::default();
        one.fault(Fault::Crash);
        one.fault(Fault::MessageLost);
        one.operation(Operation::Get);
        one.operation(Operation::Renewed);
        let mut sum = one.clone();
        sum.add(&one);
        assert_eq!((sum.faults(), sum.operations()), (2, 2));
        assert!(!sum.missing().contains(&"crash"));
        assert!(sum.missing().contains(&"pause"));
    }
}
