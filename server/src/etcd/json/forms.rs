//! The forms of JSON that grpc-gateway has: names as in the schemas (both kinds are
//! accepted), 64-bit integers as strings, bytes in base64, zero fields left out;
//! errors with their HTTP codes.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::{Buf as _, Bytes};
use prost::Message as _;
use prost_reflect::{DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::json;
use tonic::{
    Code, Status,
    codec::{DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// The type of all answers.
pub(super) const JSON: &str = "application/json";

/// Unknown fields are passed over, as etcd does: clients may be newer.
const PARSE: DeserializeOptions = DeserializeOptions::new().deny_unknown_fields(false);
const PRINT: SerializeOptions = SerializeOptions::new().use_proto_field_name(true);

/// A message from the first JSON value of a text; none at all is an empty message.
pub(super) fn parse(of: &MessageDescriptor, json: &[u8]) -> Result<DynamicMessage, Status> {
    if json.trim_ascii().is_empty() {
        return Ok(DynamicMessage::new(of.clone()));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = DynamicMessage::deserialize_with_options(of.clone(), &mut deserializer, &PARSE);
    parsed.map_err(|error| Status::invalid_argument(error.to_string()))
}

/// A message as JSON.
pub(super) fn print(message: &DynamicMessage) -> Result<Vec<u8>, Status> {
    let mut json = Vec::new();
    append(message, &mut json)?;
    Ok(json)
}

/// A message of a streamed answer.
pub(super) fn result_line(message: &DynamicMessage) -> Result<Bytes, Status> {
    let mut line = b"{\"result\":".to_vec();
    append(message, &mut line)?;
    line.extend_from_slice(b"}\n");
    Ok(line.into())
}

/// The end of a streamed answer that failed.
pub(crate) fn error_line(status: &Status) -> Bytes {
    let mut line = stream_error(status);
    line.push('\n');
    line.into()
}

/// The answer to a request that failed before anything was answered.
pub(crate) fn refused(status: &Status, is_stream: bool) -> Response {
    let body = if is_stream {
        stream_error(status)
    } else {
        // The name of `message` in earlier versions of grpc-gateway is kept, since
        // clients look for it.
        let (code, message) = (i32::from(status.code()), status.message());
        json!({ "error": message, "code": code, "message": message }).to_string()
    };
    let code = http_code(status.code());
    (code, [(header::CONTENT_TYPE, JSON)], body).into_response()
}

/// As gRPC says it.
pub(super) fn too_large(bytes_max: usize) -> Status {
    Status::resource_exhausted(format!("a JSON message may have {bytes_max} bytes"))
}

fn append(message: &DynamicMessage, json: &mut Vec<u8>) -> Result<(), Status> {
    let mut serializer = serde_json::Serializer::new(json);
    let printed = message.serialize_with_options(&mut serializer, &PRINT);
    printed.map_err(|error| Status::internal(error.to_string()))
}

/// With the names of both versions of grpc-gateway.
fn stream_error(status: &Status) -> String {
    let (code, http) = (i32::from(status.code()), http_code(status.code()));
    json!({
        "error": {
            "code": code,
            "message": status.message(),
            "grpc_code": code,
            "http_code": http.as_u16(),
            "http_status": http.canonical_reason(),
        }
    })
    .to_string()
}

/// The HTTP code for a code of gRPC.
fn http_code(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::Cancelled => StatusCode::REQUEST_TIMEOUT,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Messages whose schema is known only while running; this is that of answers.
#[derive(Clone, Debug)]
pub(super) struct Codec(pub(super) MessageDescriptor);

impl tonic::codec::Codec for Codec {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Codec;
    type Decoder = Codec;

    fn encoder(&mut self) -> Codec {
        self.clone()
    }

    fn decoder(&mut self) -> Codec {
        self.clone()
    }
}

impl Encoder for Codec {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let encoded = item.encode(to);
        encoded.map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Codec {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        let decoded = DynamicMessage::decode(self.0.clone(), bytes);
        let decoded = decoded.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(decoded))
    }
}
