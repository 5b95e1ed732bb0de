//! From the messages of etcd to those of the log, and from results to answers.

use conclave_core::{
    ids::Revision,
    keyspace::{
        Found, Record,
        txn::{OperationReply, TxnReply},
    },
};
use conclave_proto::{
    etcd::{
        etcdserverpb::{
            Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse,
            RangeRequest, RangeResponse, RequestOp, ResponseHeader, ResponseOp, TxnRequest,
            TxnResponse,
            compare::{CompareResult, CompareTarget, TargetUnion},
            request_op, response_op,
        },
        mvccpb::KeyValue,
    },
    internal::{self, compare::Target, operation::Operation},
};

use super::super::signed;

pub(super) fn put(request: PutRequest) -> internal::Put {
    internal::Put {
        key: request.key,
        value: request.value,
        lease: request.lease,
        ignore_value: request.ignore_value,
        ignore_lease: request.ignore_lease,
        previous: request.prev_kv,
    }
}

pub(super) fn delete(request: DeleteRangeRequest) -> internal::DeleteRange {
    internal::DeleteRange {
        key: request.key,
        end: request.range_end,
        previous: request.prev_kv,
    }
}

/// Orders have the same numbers, those included that there are not.
pub(super) fn range(request: RangeRequest) -> internal::Range {
    internal::Range {
        key: request.key,
        end: request.range_end,
        revision: request.revision,
        limit: request.limit,
        order: request.sort_order,
        by: request.sort_target,
        keys_only: request.keys_only,
        count_only: request.count_only,
        min_mod_revision: request.min_mod_revision,
        max_mod_revision: request.max_mod_revision,
        min_create_revision: request.min_create_revision,
        max_create_revision: request.max_create_revision,
    }
}

pub(super) fn txn(request: TxnRequest) -> internal::Txn {
    let operations = |list: Vec<RequestOp>| list.into_iter().map(operation).collect();
    internal::Txn {
        compares: request.compare.into_iter().map(compare).collect(),
        success: operations(request.success),
        failure: operations(request.failure),
    }
}

fn operation(request: RequestOp) -> internal::Operation {
    use request_op::Request;
    let operation = request.request.map(|request| match request {
        Request::RequestRange(request) => Operation::Range(range(request)),
        Request::RequestPut(request) => Operation::Put(put(request)),
        Request::RequestDeleteRange(request) => Operation::DeleteRange(delete(request)),
        Request::RequestTxn(request) => Operation::Txn(txn(request)),
    });
    internal::Operation { operation }
}

/// As in etcd: a target without its value, or with that of another target, is compared
/// with zero; a target that there is not equals everything, and a relation that there
/// is not always holds.
fn compare(request: Compare) -> internal::Compare {
    let target = CompareTarget::try_from(request.target);
    let union = request.target_union;
    let target = match (target, union) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(version))) => {
            Target::Version(version)
        }
        (Ok(CompareTarget::Version), _) => Target::Version(0),
        (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(revision))) => {
            Target::CreateRevision(revision)
        }
        (Ok(CompareTarget::Create), _) => Target::CreateRevision(0),
        (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(revision))) => {
            Target::ModRevision(revision)
        }
        (Ok(CompareTarget::Mod), _) => Target::ModRevision(0),
        (Ok(CompareTarget::Value), Some(TargetUnion::Value(value))) => Target::Value(value),
        (Ok(CompareTarget::Value), _) => Target::Value(Default::default()),
        (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(lease))) => Target::Lease(lease),
        (Ok(CompareTarget::Lease), _) => Target::Lease(0),
        (Err(_), _) => return constant(request.key, equals(request.result)),
    };
    let Ok(result) = CompareResult::try_from(request.result) else {
        if let Target::Value(_) = target {
            // But no compare of values holds for a key that is not there.
            return internal::Compare {
                key: request.key,
                end: request.range_end,
                result: CompareResult::Greater.into(),
                target: Some(Target::Version(0)),
            };
        }
        return constant(request.key, true);
    };
    internal::Compare {
        key: request.key,
        result: result.into(),
        target: Some(target),
        end: request.range_end,
    }
}

/// Whether a relation holds between equals.
fn equals(result: i32) -> bool {
    !matches!(
        CompareResult::try_from(result),
        Ok(CompareResult::NotEqual | CompareResult::Greater | CompareResult::Less)
    )
}

/// A compare that always holds, or never: a version is never negative.
fn constant(key: bytes::Bytes, holds: bool) -> internal::Compare {
    let result = if holds {
        CompareResult::Greater
    } else {
        CompareResult::Less
    };
    internal::Compare {
        key,
        result: result.into(),
        target: Some(Target::Version(-1)),
        end: Default::default(),
    }
}

/// A version of a key as the wire has it.
pub(crate) fn key_value(record: Record) -> KeyValue {
    KeyValue {
        key: record.key,
        create_revision: signed(record.create_revision),
        mod_revision: signed(record.mod_revision),
        version: signed(record.version),
        value: record.value,
        lease: record.lease.map_or(0, |lease| lease.0),
    }
}

pub(super) fn deleted(
    header: Option<ResponseHeader>,
    deleted: u64,
    previous: Vec<Record>,
) -> DeleteRangeResponse {
    DeleteRangeResponse {
        header,
        deleted: signed(deleted),
        prev_kvs: previous.into_iter().map(key_value).collect(),
    }
}

pub(super) fn found(header: Option<ResponseHeader>, found: Found) -> RangeResponse {
    RangeResponse {
        header,
        kvs: found.records.into_iter().map(key_value).collect(),
        more: found.more,
        count: signed(found.count),
    }
}

/// The answer to a transaction after which the keyspace was at `revision`.
pub(super) fn transacted(
    header: Option<ResponseHeader>,
    reply: TxnReply,
    revision: Revision,
) -> TxnResponse {
    let before = if has_written(&reply) {
        revision - 1
    } else {
        revision
    };
    results(
        header,
        reply,
        &mut Seen {
            before,
            wrote: false,
        },
    )
}

/// What the operations of a transaction have seen so far: each tells the revision that
/// it saw, which is that of the transaction once something was written.
struct Seen {
    before: Revision,
    wrote: bool,
}

impl Seen {
    fn header(&self) -> Option<ResponseHeader> {
        header_of(self.before + u64::from(self.wrote))
    }
}

/// What an operation of a transaction says of the cluster.
pub(super) fn header_of(revision: Revision) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision: signed(revision),
        ..ResponseHeader::default()
    })
}

fn results(header: Option<ResponseHeader>, reply: TxnReply, seen: &mut Seen) -> TxnResponse {
    let results = reply.results.into_iter();
    TxnResponse {
        header,
        succeeded: reply.succeeded,
        responses: results.map(|result| response(result, seen)).collect(),
    }
}

fn response(result: OperationReply, seen: &mut Seen) -> ResponseOp {
    use response_op::Response;
    let response = match result {
        OperationReply::Put(previous) => {
            seen.wrote = true;
            Response::ResponsePut(PutResponse {
                header: seen.header(),
                prev_kv: previous.map(key_value),
            })
        }
        OperationReply::DeleteRange {
            deleted: count,
            previous,
        } => {
            seen.wrote |= count > 0;
            Response::ResponseDeleteRange(deleted(seen.header(), count, previous))
        }
        OperationReply::Range(result) => Response::ResponseRange(found(seen.header(), result)),
        OperationReply::Txn(reply) => {
            let header = Some(ResponseHeader::default());
            Response::ResponseTxn(results(header, reply, seen))
        }
    };
    ResponseOp {
        response: Some(response),
    }
}

fn has_written(reply: &TxnReply) -> bool {
    reply.results.iter().any(|result| match result {
        OperationReply::Put(_) => true,
        OperationReply::DeleteRange { deleted, .. } => *deleted > 0,
        OperationReply::Range(_) => false,
        OperationReply::Txn(reply) => has_written(reply),
    })
}
