//! `v3lockpb.Lock`, on the queue of native locks.
//!
//! The key of a lock is `NAME/LEASE`, with the lease in lowercase hex, and has no value.
//! A call with a lease that has such a key already waits for that, or has it.

use async_trait::async_trait;
use conclave_proto::{
    etcd::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse, lock_server::Lock},
    internal::{
        DeleteRange, LockAcquire, operation::Operation as Kind, primitive_command::Command,
    },
};
use tonic::{Request, Response, Status};

use super::{
    Etcd,
    contention::{contend, name_of, run},
    status::Error,
};
use crate::metrics::Method;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct LockService(pub(super) Etcd);

#[async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { lock(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Lock, request, work).await
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { unlock(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Unlock, request, work).await
    }
}

async fn lock(etcd: &Etcd, request: LockRequest) -> Result<LockResponse, Error> {
    let LockRequest { name, lease } = request;
    let name = name_of(&name)?;
    let command = |session_id, tag| {
        Command::LockAcquire(LockAcquire {
            name: name.clone(),
            session_id,
            tag,
            plain: true,
            ..LockAcquire::default()
        })
    };
    let granted = contend(etcd, name.clone(), lease, command).await?;
    Ok(LockResponse {
        header: granted.header,
        key: granted.key,
    })
}

/// Deletes the key, whoever has it.
async fn unlock(etcd: &Etcd, request: UnlockRequest) -> Result<UnlockResponse, Error> {
    let UnlockRequest { key } = request;
    let delete = DeleteRange {
        key,
        ..DeleteRange::default()
    };
    let (header, _) = run(etcd, Vec::new(), Kind::DeleteRange(delete)).await?;
    Ok(UnlockResponse { header })
}
