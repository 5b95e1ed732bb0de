//! Keys and values: reads, writes, and transactions of both.
//!
//! Reads are repeated until there is an answer. A write is repeated only if it
//! certainly was not done; if that is not known, the caller is told so
//! ([`Error::OutcomeUnknown`]), since a second put is a second change. A transaction
//! that compares the revision which it read before may be repeated by its caller.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use conclave_proto::etcd::etcdserverpb::{
    self as pb, compare::TargetUnion, kv_client::KvClient, range_request, request_op, response_op,
};

use crate::{
    client::PATIENCE,
    error::Error,
    keys::{KeyRange, KeyValue},
    transport::{ANSWER_BYTES_MAX, READ_TIMEOUT, Transport},
};

/// A read of more keys may take longer than others.
const KEYS_MANY: i64 = 1_000;

/// The keys and values of a cluster. Made by [`crate::Client::kv`].
///
/// ```no_run
/// # async fn example(client: conclave_client::Client) -> Result<(), conclave_client::Error> {
/// use conclave_client::{Compare, Delete, Get, KeyRange, Put, Txn};
///
/// let kv = client.kv();
/// kv.put(Put::new("config/color", "green")).await?;
/// let found = kv.get("config/color").await?;
/// assert_eq!(&found.kvs[0].value[..], b"green");
///
/// // Change it, unless somebody else did meanwhile.
/// let seen = found.kvs[0].mod_revision;
/// let done = kv
///     .txn(Txn::when([Compare::mod_revision("config/color").equals(seen)])
///         .then([Put::new("config/color", "blue")])
///         .otherwise([Get::new("config/color")]))
///     .await?;
/// println!("mine: {}", done.succeeded);
///
/// let first = kv.get(Get::new(KeyRange::prefix("config/")).limit(100)).await?;
/// kv.delete(Delete::new(KeyRange::prefix("config/"))).await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Kv {
    transport: Arc<Transport>,
}

/// What to read.
#[derive(Clone, Debug, PartialEq)]
pub struct Get(pb::RangeRequest);

/// What to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Put(pb::PutRequest);

/// What to delete.
#[derive(Clone, Debug, PartialEq)]
pub struct Delete(pb::DeleteRangeRequest);

/// Operations that happen together, or others, depending on what is there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Txn(pb::TxnRequest);

/// One operation of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct Op(pb::RequestOp);

/// A condition of a transaction. Of a key that is not there, all is zero, and no
/// comparison of its value holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Compare(pb::Compare);

/// In which order to read. The default is by key, ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortBy {
    /// By key.
    Key,
    /// By how often it was written since it was created.
    Version,
    /// By the revision that created it.
    CreateRevision,
    /// By the revision that wrote it last.
    ModRevision,
    /// By value.
    Value,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The newest revision at the time. A watch from the one after it misses nothing.
    pub revision: i64,
    /// The keys with their values.
    pub kvs: Vec<KeyValue>,
    /// Whether the limit left some out.
    pub more: bool,
    /// How many keys there are in the range, whatever the limit.
    pub count: i64,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Written {
    /// The revision of this write.
    pub revision: i64,
    /// What was there before, if it was asked for and there was something.
    pub previous: Option<KeyValue>,
}

/// What was deleted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Deleted {
    /// The newest revision; that of the deletion, if anything was deleted.
    pub revision: i64,
    /// How many keys.
    pub deleted: i64,
    /// What they were, if it was asked for.
    pub previous: Vec<KeyValue>,
}

/// What a transaction did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TxnDone {
    /// The newest revision; that of its changes, if it made any.
    pub revision: i64,
    /// Whether all conditions held.
    pub succeeded: bool,
    /// What came of each operation, in order.
    pub results: Vec<OpResult>,
}

/// What came of one operation.
#[derive(Clone, Debug, PartialEq)]
pub enum OpResult {
    /// Of a [`Get`].
    Found(Found),
    /// Of a [`Put`].
    Written(Written),
    /// Of a [`Delete`].
    Deleted(Deleted),
    /// Of a [`Txn`] within.
    Txn(TxnDone),
}

impl Kv {
    pub(crate) fn new(transport: Arc<Transport>) -> Kv {
        Kv { transport }
    }

    /// Reads, linearizably unless the request says otherwise.
    ///
    /// # Errors
    /// [`Error::Compacted`] for a revision whose history is gone; [`Error::Server`] with
    /// `OUT_OF_RANGE` for one that was not reached yet.
    pub async fn get(&self, get: impl Into<Get>) -> Result<Found, Error> {
        let request = get.into().0;
        let call = |channel| {
            let request = request.clone();
            async move { client(channel).range(request).await }
        };
        let limit = read_within(&request);
        let answer = self.transport.read(PATIENCE, limit, call).await?;
        Ok(answer.into())
    }

    /// Writes one key.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`] if it was to be bound to a lease that is not there;
    /// [`Error::OutcomeUnknown`] if nobody answered.
    pub async fn put(&self, put: Put) -> Result<Written, Error> {
        let request = put.0;
        let call = |channel| {
            let request = request.clone();
            async move { client(channel).put(request).await }
        };
        Ok(self.transport.once(PATIENCE, call).await?.into())
    }

    /// Deletes keys. None at all is no error.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`] if nobody answered.
    pub async fn delete(&self, delete: impl Into<Delete>) -> Result<Deleted, Error> {
        let request = delete.into().0;
        let call = |channel| {
            let request = request.clone();
            async move { client(channel).delete_range(request).await }
        };
        Ok(self.transport.once(PATIENCE, call).await?.into())
    }

    /// Does all operations of one branch at one revision, or none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for too many operations, or two puts of one key;
    /// [`Error::OutcomeUnknown`] if nobody answered.
    pub async fn txn(&self, txn: Txn) -> Result<TxnDone, Error> {
        let request = txn.0;
        let call = |channel| {
            let request = request.clone();
            async move { client(channel).txn(request).await }
        };
        if is_read_only(&request) {
            let answer = self.transport.read(PATIENCE, PATIENCE, call).await?;
            return Ok(answer.into());
        }
        Ok(self.transport.once(PATIENCE, call).await?.into())
    }

    /// Gives up the history below a revision; what is there now stays. With
    /// `physical` it waits until the server that is asked has let go of it.
    ///
    /// # Errors
    /// [`Error::Compacted`] if that was done before, unless it may have been by an attempt
    /// of this call; [`Error::Server`] with `OUT_OF_RANGE` for a revision that was not reached yet.
    pub async fn compact(&self, revision: i64, physical: bool) -> Result<(), Error> {
        let request = pb::CompactionRequest { revision, physical };
        let call = |channel| async move { client(channel).compact(request).await };
        let is_done = |error: &Error| matches!(error, Error::Compacted { .. });
        let limit = match physical {
            true => PATIENCE,
            false => READ_TIMEOUT,
        };
        self.transport
            .complete(PATIENCE, limit, is_done, call)
            .await
    }
}

fn client(channel: tonic::transport::Channel) -> KvClient<tonic::transport::Channel> {
    KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

impl Get {
    /// Reads one key, or a range.
    pub fn new(keys: impl Into<KeyRange>) -> Get {
        let KeyRange { key, end } = keys.into();
        Get(pb::RangeRequest {
            key,
            range_end: end,
            ..pb::RangeRequest::default()
        })
    }

    /// At most so many keys; 0 for all.
    pub fn limit(mut self, limit: i64) -> Get {
        self.0.limit = limit;
        self
    }

    /// As it was at this revision.
    pub fn at_revision(mut self, revision: i64) -> Get {
        self.0.revision = revision;
        self
    }

    /// In this order, ascending.
    pub fn ascending(self, by: SortBy) -> Get {
        self.sorted(by, range_request::SortOrder::Ascend)
    }

    /// In this order, descending.
    pub fn descending(self, by: SortBy) -> Get {
        self.sorted(by, range_request::SortOrder::Descend)
    }

    fn sorted(mut self, by: SortBy, order: range_request::SortOrder) -> Get {
        let target = match by {
            SortBy::Key => range_request::SortTarget::Key,
            SortBy::Version => range_request::SortTarget::Version,
            SortBy::CreateRevision => range_request::SortTarget::Create,
            SortBy::ModRevision => range_request::SortTarget::Mod,
            SortBy::Value => range_request::SortTarget::Value,
        };
        self.0.set_sort_target(target);
        self.0.set_sort_order(order);
        self
    }

    /// Without the values.
    pub fn keys_only(mut self) -> Get {
        self.0.keys_only = true;
        self
    }

    /// Nothing but [`Found::count`].
    pub fn count_only(mut self) -> Get {
        self.0.count_only = true;
        self
    }

    /// Whatever the server that is asked knows: fast, and perhaps of a while ago.
    pub fn serializable(mut self) -> Get {
        self.0.serializable = true;
        self
    }

    /// Only keys that were written at these revisions; 0 leaves a side open.
    pub fn mod_revisions(mut self, min: i64, max: i64) -> Get {
        (self.0.min_mod_revision, self.0.max_mod_revision) = (min, max);
        self
    }

    /// Only keys that were created at these revisions; 0 leaves a side open.
    pub fn create_revisions(mut self, min: i64, max: i64) -> Get {
        (self.0.min_create_revision, self.0.max_create_revision) = (min, max);
        self
    }
}

impl Put {
    /// Writes a value, and unbinds the key from the lease that it may have.
    pub fn new(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Put {
        Put(pb::PutRequest {
            key: key.into(),
            value: value.into(),
            ..pb::PutRequest::default()
        })
    }

    /// Binds the key to a lease, with which it ends.
    pub fn lease(mut self, id: i64) -> Put {
        self.0.lease = id;
        self
    }

    /// Keeps the lease that the key has; it must be there.
    pub fn keep_lease(mut self) -> Put {
        self.0.ignore_lease = true;
        self
    }

    /// Keeps the value that the key has, and so only binds it to a lease or not; it
    /// must be there, and the value that was given must be empty.
    pub fn keep_value(mut self) -> Put {
        self.0.ignore_value = true;
        self
    }

    /// Asks for what was there before.
    pub fn previous(mut self) -> Put {
        self.0.prev_kv = true;
        self
    }
}

impl Delete {
    /// Deletes one key, or a range.
    pub fn new(keys: impl Into<KeyRange>) -> Delete {
        let KeyRange { key, end } = keys.into();
        Delete(pb::DeleteRangeRequest {
            key,
            range_end: end,
            prev_kv: false,
        })
    }

    /// Asks for what was there before.
    pub fn previous(mut self) -> Delete {
        self.0.prev_kv = true;
        self
    }
}

impl Txn {
    /// If all of this holds; of nothing, it does.
    pub fn when(conditions: impl IntoIterator<Item = Compare>) -> Txn {
        Txn(pb::TxnRequest {
            compare: conditions.into_iter().map(|compare| compare.0).collect(),
            ..pb::TxnRequest::default()
        })
    }

    /// Adds operations to what is done then.
    pub fn then<O: Into<Op>>(mut self, ops: impl IntoIterator<Item = O>) -> Txn {
        self.0.success.extend(ops.into_iter().map(|op| op.into().0));
        self
    }

    /// Adds operations to what is done else.
    pub fn otherwise<O: Into<Op>>(mut self, ops: impl IntoIterator<Item = O>) -> Txn {
        self.0.failure.extend(ops.into_iter().map(|op| op.into().0));
        self
    }
}

/// Half a condition: what of which keys.
#[derive(Clone, Debug)]
#[must_use = "it is compared with something"]
pub struct Compared {
    keys: KeyRange,
    target: pb::compare::CompareTarget,
}

impl Compare {
    /// The revision that created it; 0 if it is not there.
    pub fn create_revision(keys: impl Into<KeyRange>) -> Compared {
        Compared::new(keys, pb::compare::CompareTarget::Create)
    }

    /// The revision that wrote it last; 0 if it is not there.
    pub fn mod_revision(keys: impl Into<KeyRange>) -> Compared {
        Compared::new(keys, pb::compare::CompareTarget::Mod)
    }

    /// How often it was written since it was created; 0 if it is not there.
    pub fn version(keys: impl Into<KeyRange>) -> Compared {
        Compared::new(keys, pb::compare::CompareTarget::Version)
    }

    /// The lease that it is bound to; 0 if to none.
    pub fn lease(keys: impl Into<KeyRange>) -> Compared {
        Compared::new(keys, pb::compare::CompareTarget::Lease)
    }

    /// Its value. Each of [`Compare`]'s other comparisons takes a number, these bytes.
    pub fn value(keys: impl Into<KeyRange>) -> ComparedValue {
        ComparedValue(keys.into())
    }
}

/// Half a condition: the value of which keys.
#[derive(Clone, Debug)]
#[must_use = "it is compared with something"]
pub struct ComparedValue(KeyRange);

/// The four comparisons. Of a range, each key must stand the comparison.
macro_rules! comparisons {
    ($of:ty, $with:ty) => {
        impl $of {
            /// It is the same.
            pub fn equals(self, with: $with) -> Compare {
                self.compare(pb::compare::CompareResult::Equal, with)
            }

            /// It is another.
            pub fn differs_from(self, with: $with) -> Compare {
                self.compare(pb::compare::CompareResult::NotEqual, with)
            }

            /// It is greater.
            pub fn exceeds(self, with: $with) -> Compare {
                self.compare(pb::compare::CompareResult::Greater, with)
            }

            /// It is less.
            pub fn is_below(self, with: $with) -> Compare {
                self.compare(pb::compare::CompareResult::Less, with)
            }
        }
    };
}

comparisons!(Compared, i64);
comparisons!(ComparedValue, impl Into<Bytes>);

impl Compared {
    fn new(keys: impl Into<KeyRange>, target: pb::compare::CompareTarget) -> Compared {
        Compared {
            keys: keys.into(),
            target,
        }
    }

    fn compare(self, result: pb::compare::CompareResult, with: i64) -> Compare {
        let with = match self.target {
            pb::compare::CompareTarget::Version => TargetUnion::Version(with),
            pb::compare::CompareTarget::Create => TargetUnion::CreateRevision(with),
            pb::compare::CompareTarget::Mod => TargetUnion::ModRevision(with),
            pb::compare::CompareTarget::Lease => TargetUnion::Lease(with),
            pb::compare::CompareTarget::Value => unreachable!("values are `ComparedValue`"),
        };
        compare(self.keys, self.target, result, with)
    }
}

impl ComparedValue {
    fn compare(self, result: pb::compare::CompareResult, with: impl Into<Bytes>) -> Compare {
        let target = pb::compare::CompareTarget::Value;
        compare(self.0, target, result, TargetUnion::Value(with.into()))
    }
}

fn compare(
    keys: KeyRange,
    target: pb::compare::CompareTarget,
    result: pb::compare::CompareResult,
    with: TargetUnion,
) -> Compare {
    Compare(pb::Compare {
        result: result.into(),
        target: target.into(),
        key: keys.key,
        range_end: keys.end,
        target_union: Some(with),
    })
}

impl<K: Into<KeyRange>> From<K> for Get {
    fn from(keys: K) -> Get {
        Get::new(keys)
    }
}

impl<K: Into<KeyRange>> From<K> for Delete {
    fn from(keys: K) -> Delete {
        Delete::new(keys)
    }
}

impl From<Get> for Op {
    fn from(get: Get) -> Op {
        Op::new(request_op::Request::RequestRange(get.0))
    }
}

impl From<Put> for Op {
    fn from(put: Put) -> Op {
        Op::new(request_op::Request::RequestPut(put.0))
    }
}

impl From<Delete> for Op {
    fn from(delete: Delete) -> Op {
        Op::new(request_op::Request::RequestDeleteRange(delete.0))
    }
}

impl From<Txn> for Op {
    fn from(txn: Txn) -> Op {
        Op::new(request_op::Request::RequestTxn(txn.0))
    }
}

impl Op {
    fn new(request: request_op::Request) -> Op {
        Op(pb::RequestOp {
            request: Some(request),
        })
    }
}

/// How long a server may take for a read: a large one needs time.
fn read_within(read: &pb::RangeRequest) -> Duration {
    let is_bounded = (1..=KEYS_MANY).contains(&read.limit);
    match read.range_end.is_empty() || read.count_only || is_bounded {
        true => READ_TIMEOUT,
        false => PATIENCE,
    }
}

/// Whether a transaction changes nothing, so that it may be repeated.
fn is_read_only(txn: &pb::TxnRequest) -> bool {
    let mut ops = txn.success.iter().chain(&txn.failure);
    ops.all(|op| match &op.request {
        Some(request_op::Request::RequestRange(_)) => true,
        Some(request_op::Request::RequestTxn(txn)) => is_read_only(txn),
        _ => false,
    })
}

impl From<pb::RangeResponse> for Found {
    fn from(answer: pb::RangeResponse) -> Found {
        Found {
            revision: revision(answer.header.as_ref()),
            kvs: answer.kvs,
            more: answer.more,
            count: answer.count,
        }
    }
}

impl From<pb::PutResponse> for Written {
    fn from(answer: pb::PutResponse) -> Written {
        Written {
            revision: revision(answer.header.as_ref()),
            previous: answer.prev_kv,
        }
    }
}

impl From<pb::DeleteRangeResponse> for Deleted {
    fn from(answer: pb::DeleteRangeResponse) -> Deleted {
        Deleted {
            revision: revision(answer.header.as_ref()),
            deleted: answer.deleted,
            previous: answer.prev_kvs,
        }
    }
}

impl From<pb::TxnResponse> for TxnDone {
    fn from(answer: pb::TxnResponse) -> TxnDone {
        let results = answer.responses.into_iter();
        TxnDone {
            revision: revision(answer.header.as_ref()),
            succeeded: answer.succeeded,
            results: results
                .filter_map(|op| op.response.map(op_result))
                .collect(),
        }
    }
}

fn op_result(response: response_op::Response) -> OpResult {
    match response {
        response_op::Response::ResponseRange(range) => OpResult::Found(range.into()),
        response_op::Response::ResponsePut(put) => OpResult::Written(put.into()),
        response_op::Response::ResponseDeleteRange(range) => OpResult::Deleted(range.into()),
        response_op::Response::ResponseTxn(txn) => OpResult::Txn(txn.into()),
    }
}

fn revision(header: Option<&pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}
