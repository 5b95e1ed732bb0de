//! `etcdserverpb.Auth`. There are no users yet, so everything is as with etcd before
//! one was made: authentication is disabled, and nobody is found. Making one is refused
//! as not enabled.

use async_trait::async_trait;
use conclave_core::replica::Query;
use conclave_proto::etcd::etcdserverpb::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse,
    AuthRoleAddRequest, AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse,
    AuthRoleGetRequest, AuthRoleGetResponse, AuthRoleGrantPermissionRequest,
    AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest,
    AuthStatusResponse, AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest,
    AuthUserChangePasswordResponse, AuthUserDeleteRequest, AuthUserDeleteResponse,
    AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest, AuthUserGrantRoleResponse,
    AuthUserListRequest, AuthUserListResponse, AuthUserRevokeRoleRequest,
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse, ResponseHeader,
    auth_server::Auth,
};
use tonic::{Request, Response, Status};

use super::{
    Etcd,
    status::{AuthError, Error},
};
use crate::metrics::Method;

/// The revision of a store of users that nothing was ever written to.
const REVISION_FRESH: u64 = 1;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct AuthService(pub(super) Etcd);

#[async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::RootUserMissing.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| {
            Ok(AuthDisableResponse {
                header: header(etcd).await?,
            })
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn auth_status(
        &self,
        request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| {
            Ok(AuthStatusResponse {
                header: header(etcd).await?,
                enabled: false,
                auth_revision: REVISION_FRESH,
            })
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::Disabled.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_add(
        &self,
        request: Request<AuthUserAddRequest>,
    ) -> Result<Response<AuthUserAddResponse>, Status> {
        let etcd = &self.0;
        let work = async |request: AuthUserAddRequest| {
            let error = if request.name.is_empty() {
                AuthError::UserNameEmpty
            } else {
                AuthError::Disabled
            };
            Err(error.into())
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_get(
        &self,
        request: Request<AuthUserGetRequest>,
    ) -> Result<Response<AuthUserGetResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::UserNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_list(
        &self,
        request: Request<AuthUserListRequest>,
    ) -> Result<Response<AuthUserListResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| {
            Ok(AuthUserListResponse {
                header: header(etcd).await?,
                ..AuthUserListResponse::default()
            })
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_delete(
        &self,
        request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::UserNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::UserNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::UserNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::UserNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_add(
        &self,
        request: Request<AuthRoleAddRequest>,
    ) -> Result<Response<AuthRoleAddResponse>, Status> {
        let etcd = &self.0;
        let work = async |request: AuthRoleAddRequest| {
            let error = if request.name.is_empty() {
                AuthError::RoleNameEmpty
            } else {
                AuthError::Disabled
            };
            Err(error.into())
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_get(
        &self,
        request: Request<AuthRoleGetRequest>,
    ) -> Result<Response<AuthRoleGetResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::RoleNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_list(
        &self,
        request: Request<AuthRoleListRequest>,
    ) -> Result<Response<AuthRoleListResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| {
            Ok(AuthRoleListResponse {
                header: header(etcd).await?,
                ..AuthRoleListResponse::default()
            })
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_delete(
        &self,
        request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::RoleNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let etcd = &self.0;
        let work = async |request: AuthRoleGrantPermissionRequest| {
            let error = if request.perm.is_none() {
                AuthError::PermissionNotGiven
            } else {
                AuthError::RoleNotFound
            };
            Err(error.into())
        };
        etcd.serve(Method::Auth, request, work).await
    }

    async fn role_revoke_permission(
        &self,
        request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Err(AuthError::RoleNotFound.into());
        etcd.serve(Method::Auth, request, work).await
    }
}

/// As of a moment at which this member was up to date: so that nobody takes an answer
/// of one that was cut off for that of the cluster.
async fn header(etcd: &Etcd) -> Result<Option<ResponseHeader>, Error> {
    let answer = etcd.read(|| Query::Barrier).await?;
    Ok(etcd.header(answer.revision, answer.term))
}
