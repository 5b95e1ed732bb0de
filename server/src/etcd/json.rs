//! The etcd API over HTTP and JSON, in the forms of grpc-gateway: `curl` and Patroni
//! speak it.
//!
//! Nothing here knows a message. Each path stands for a method; JSON is turned into
//! its request by the schemas, the gRPC services are called within the process, and
//! what they answer is turned into JSON again. So both ways into the server reach the
//! same code, with the same limits, counts and errors.

mod forms;
mod paths;
mod splitter;

use std::{convert::Infallible, mem, sync::LazyLock};

use axum::{
    Router,
    body::{self, Body, BodyDataStream},
    extract::Request,
    http::{HeaderMap, header, uri::PathAndQuery},
    response::{IntoResponse as _, Response},
    routing::post,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};
use tonic::{
    Code, Status, Streaming,
    client::{Grpc, GrpcService},
    codegen::{Body as HttpBody, StdError},
    metadata::{Ascii, MetadataKey, MetadataValue},
};

pub(crate) use self::forms::{error_line, refused};
use self::{forms::Codec, paths::PATHS, splitter::Splitter};

/// In front of every path. `/v3beta/` is what clients of etcd 3.3 use.
const VERSIONS: [&str; 2] = ["v3", "v3beta"];
/// So much longer may a request be as JSON: bytes in base64, names, escapes.
const JSON_FACTOR: usize = 2;
/// A header that reaches the service without this.
const METADATA_PREFIX: &str = "grpc-metadata-";

static SCHEMAS: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(conclave_proto::DESCRIPTORS)
        .expect("the schemas were compiled with this")
});

/// The gRPC services, as this module uses them.
pub(crate) trait Services:
    GrpcService<
        tonic::body::Body,
        ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
        Error: Into<StdError>,
        Future: Send,
    > + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> Services for S where
    S: GrpcService<
            tonic::body::Body,
            ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
            Error: Into<StdError>,
            Future: Send,
        > + Clone
        + Send
        + Sync
        + 'static
{
}

/// Routes for all methods of the etcd API, answered by these services. A message of
/// a request may have `bytes_max` bytes.
pub(crate) fn routes(services: &impl Services, bytes_max: usize) -> Router {
    let mut router = Router::new();
    for (name, path) in PATHS {
        let method = Method::find(name).expect("every path stands for a method of the schemas");
        for version in VERSIONS {
            let (method, services) = (method.clone(), services.clone());
            let json_max = bytes_max * JSON_FACTOR;
            let serve = move |request| method.serve(services, request, json_max);
            router = router.route(&format!("/{version}/{path}"), post(serve));
        }
    }
    router
}

/// Whether what is served at this path answers line by line.
pub(crate) fn is_stream(path: &str) -> bool {
    let below = |version: &&'static str| {
        path.strip_prefix('/')?
            .strip_prefix(*version)?
            .strip_prefix('/')
    };
    let Some(below) = VERSIONS.iter().find_map(below) else {
        return false;
    };
    let of_method = PATHS.iter().find(|(_, known)| *known == below);
    of_method
        .and_then(|(name, _)| Method::find(name))
        .is_some_and(|method| method.streams_out)
}

/// A method of a service.
#[derive(Clone, Debug)]
struct Method {
    path: PathAndQuery,
    input: MessageDescriptor,
    output: MessageDescriptor,
    streams_in: bool,
    streams_out: bool,
}

impl Method {
    /// By its full name, as `etcdserverpb.KV/Range`.
    fn find(name: &str) -> Option<Method> {
        let (service, method) = name.split_once('/')?;
        let service = SCHEMAS.get_service_by_name(service)?;
        let method = service.methods().find(|known| known.name() == method)?;
        Some(Method {
            path: PathAndQuery::try_from(format!("/{name}")).ok()?,
            input: method.input(),
            output: method.output(),
            streams_in: method.is_client_streaming(),
            streams_out: method.is_server_streaming(),
        })
    }

    async fn serve(self, services: impl Services, request: Request, json_max: usize) -> Response {
        let metadata = metadata(request.headers());
        let body = request.into_body();
        let grpc = Grpc::new(services).max_decoding_message_size(usize::MAX);
        let answer = if self.streams_out {
            self.stream(grpc, metadata, body, json_max).await
        } else {
            self.call(grpc, metadata, body, json_max).await
        };
        answer.unwrap_or_else(|status| refused(&status, self.streams_out))
    }

    async fn call(
        &self,
        mut grpc: Grpc<impl Services>,
        metadata: Metadata,
        body: Body,
        json_max: usize,
    ) -> Result<Response, Status> {
        let read = body::to_bytes(body, json_max).await;
        let json = read.map_err(|_| forms::too_large(json_max))?;
        let message = forms::parse(&self.input, &json)?;
        ready(&mut grpc).await?;
        let request = request(metadata, message);
        let codec = Codec(self.output.clone());
        let answer = grpc.unary(request, self.path.clone(), codec).await?;
        let json = forms::print(answer.get_ref())?;
        Ok(([(header::CONTENT_TYPE, forms::JSON)], json).into_response())
    }

    /// Answers once there is the first message, so that an error before it has its own
    /// HTTP code.
    async fn stream(
        &self,
        mut grpc: Grpc<impl Services>,
        metadata: Metadata,
        body: Body,
        json_max: usize,
    ) -> Result<Response, Status> {
        let mut messages = Messages {
            body: body.into_data_stream(),
            splitter: Splitter::new(json_max),
            input: self.input.clone(),
        };
        let first = messages.next().await?;
        ready(&mut grpc).await?;
        let (path, codec) = (self.path.clone(), Codec(self.output.clone()));
        let answers = if self.streams_in {
            let request = request(metadata, messages.rest(first));
            grpc.streaming(request, path, codec).await?
        } else {
            let first = first.unwrap_or_else(|| DynamicMessage::new(self.input.clone()));
            let request = request(metadata, first);
            grpc.server_streaming(request, path, codec).await?
        };
        let mut answers = answers.into_inner();
        let first = answers.message().await?;
        let lines = Body::from_stream(lines(first, answers));
        Ok(([(header::CONTENT_TYPE, forms::JSON)], lines).into_response())
    }
}

/// The messages of a request body, one JSON object after the other.
struct Messages {
    body: BodyDataStream,
    splitter: Splitter,
    input: MessageDescriptor,
}

impl Messages {
    /// The next message, as soon as it is there; `None` at the end.
    async fn next(&mut self) -> Result<Option<DynamicMessage>, Status> {
        loop {
            if let Some(json) = self.splitter.take() {
                return forms::parse(&self.input, &json).map(Some);
            }
            let Some(chunk) = self.body.next().await else {
                let rest = self.splitter.rest();
                let is_empty = rest.trim_ascii().is_empty();
                return match is_empty {
                    true => Ok(None),
                    false => forms::parse(&self.input, &rest).map(Some),
                };
            };
            let chunk = chunk.map_err(|error| Status::cancelled(error.to_string()))?;
            self.splitter.push(&chunk)?;
        }
    }

    /// All messages, of which one was read already. Malformed ones end them, as there
    /// is no way to refuse what comes after the head of an answer.
    fn rest(self, first: Option<DynamicMessage>) -> impl Stream<Item = DynamicMessage> + Send {
        let others = stream::unfold(self, |mut messages| async move {
            match messages.next().await {
                Ok(message) => message.map(|message| (message, messages)),
                Err(error) => {
                    tracing::debug!(%error, "a stream of requests ends");
                    None
                }
            }
        });
        // Not asked for more than there was.
        let is_empty = first.is_none();
        stream::iter(first).chain(others.take_while(move |_| std::future::ready(!is_empty)))
    }
}

/// The lines of a streamed answer. An error is the last of them.
fn lines(
    first: Option<DynamicMessage>,
    answers: Streaming<DynamicMessage>,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    let first = first.map(Ok);
    stream::unfold((first, Some(answers)), |(mut first, answers)| async move {
        let mut answers = answers?;
        let next = match mem::take(&mut first) {
            Some(first) => Some(first),
            None => answers.message().await.transpose(),
        };
        let line = next?.and_then(|message| forms::result_line(&message));
        Some(match line {
            Ok(line) => (Ok(line), (None, Some(answers))),
            Err(status) => (Ok(error_line(&status)), (None, None)),
        })
    })
}

/// What a service gets beside the message.
type Metadata = Vec<(MetadataKey<Ascii>, MetadataValue<Ascii>)>;

fn metadata(headers: &HeaderMap) -> Metadata {
    let passed = headers.iter().filter_map(|(name, value)| {
        let name = name.as_str();
        let name = match name {
            "authorization" => name,
            _ => name.strip_prefix(METADATA_PREFIX)?,
        };
        let key = MetadataKey::from_bytes(name.as_bytes()).ok()?;
        let value = MetadataValue::try_from(value.as_bytes()).ok()?;
        Some((key, value))
    });
    passed.collect()
}

fn request<T>(metadata: Metadata, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    for (key, value) in metadata {
        request.metadata_mut().insert(key, value);
    }
    request
}

async fn ready(grpc: &mut Grpc<impl Services>) -> Result<(), Status> {
    let ready = grpc.ready().await;
    ready.map_err(|error| Status::new(Code::Unavailable, error.into().to_string()))
}

#[cfg(test)]
mod tests;
