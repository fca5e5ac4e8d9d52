//! The error member of a response.

use ferry_shared::errno::Errno;
use ferry_shared::msg::Failure;

/// Why a request was refused: what the `error` member of the response holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// JSON-RPC code, or a negated error number.
    pub code: i32,
    /// One sentence for the operator.
    pub message: String,
    /// The error number behind it, where there is one.
    pub errno: Option<Errno>,
}

impl RpcError {
    /// JSON could not be parsed.
    pub const PARSE_ERROR: i32 = -32700;
    /// Not a JSON-RPC request.
    pub const INVALID_REQUEST: i32 = -32600;
    /// Unknown or forbidden method.
    pub const METHOD_NOT_FOUND: i32 = -32601;
    /// The parameters do not fit the method.
    pub const INVALID_PARAMS: i32 = -32602;
    /// The server failed, or an fsdev could not be created.
    pub const INTERNAL_ERROR: i32 = -32603;
    /// The method does not fit the state of the framework.
    pub const INVALID_STATE: i32 = -1;

    /// An error that is not about an error number.
    pub fn new(code: i32, message: impl Into<String>) -> RpcError {
        RpcError {
            code,
            message: message.into(),
            errno: None,
        }
    }

    /// A refusal whose code is the negated error number.
    pub fn from_failure(failure: Failure) -> RpcError {
        let code = failure.errno.raw().saturating_neg();
        RpcError::with_code(code, failure)
    }

    /// A refusal with another code than its error number.
    pub fn with_code(code: i32, failure: Failure) -> RpcError {
        RpcError {
            code,
            message: format!("{}: {}", failure.errno, failure.detail),
            errno: Some(failure.errno),
        }
    }
}

impl From<Failure> for RpcError {
    fn from(failure: Failure) -> RpcError {
        RpcError::from_failure(failure)
    }
}
