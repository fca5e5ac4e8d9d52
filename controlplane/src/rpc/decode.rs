//! Turns the `params` member into the arguments of a method, by its row in the table.

use core::fmt;

use serde::Deserialize;
use serde::Deserializer;
use serde::de::MapAccess;
use serde::de::SeqAccess;
use serde::de::Visitor;
use serde_json::Value;

use super::RpcError;
use super::table::Kind;
use super::table::Method;
use super::table::Param;
use super::table::Rule;

/// The `params` member as it was written: keys may be repeated.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Params {
    /// Absent or null.
    #[default]
    Absent,
    /// An array.
    Array,
    /// An object.
    Object(Vec<(String, Value)>),
}

impl From<serde_json::Map<String, Value>> for Params {
    fn from(map: serde_json::Map<String, Value>) -> Params {
        Params::Object(map.into_iter().collect())
    }
}

impl<'de> Deserialize<'de> for Params {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Params, D::Error> {
        deserializer.deserialize_any(ParamsVisitor)
    }
}

struct ParamsVisitor;

impl<'de> Visitor<'de> for ParamsVisitor {
    type Value = Params;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, an array or null")
    }

    fn visit_unit<E>(self) -> Result<Params, E> {
        Ok(Params::Absent)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Params, A::Error> {
        while seq.next_element::<serde::de::IgnoredAny>()?.is_some() {}
        Ok(Params::Array)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Params, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry::<String, Value>()? {
            members.push(member);
        }
        Ok(Params::Object(members))
    }
}

/// The arguments of one call: checked names, checked types, mandatory ones present.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Args(Vec<(&'static str, Value)>);

impl Args {
    /// An argument, if it was given.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// A string argument.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str()
    }

    /// A number argument.
    pub fn number(&self, name: &str) -> Option<u32> {
        self.get(name)?
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
    }

    /// A large number argument.
    pub fn big(&self, name: &str) -> Option<u64> {
        self.get(name)?.as_u64()
    }

    /// A boolean argument.
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.get(name)?.as_bool()
    }

    /// A mandatory string argument; the decoder has made sure of it.
    pub fn required(&self, name: &str) -> &str {
        self.text(name).unwrap_or_default()
    }
}

/// Decodes the parameters of a call.
pub fn decode(method: &Method, params: &Params) -> Result<Args, RpcError> {
    let (code, text) = match method.rule {
        Rule::Ignored => return Ok(Args::default()),
        Rule::Absent(text) => {
            return match params {
                Params::Absent => Ok(Args::default()),
                Params::Array | Params::Object(_) => {
                    Err(RpcError::new(RpcError::INVALID_PARAMS, text))
                }
            };
        }
        Rule::Strict(code, text) => (code, text),
    };
    let members = match params {
        Params::Absent => &[][..],
        Params::Object(members) => members.as_slice(),
        Params::Array => {
            return Err(RpcError::new(
                code,
                format!("{text}: params must be an object"),
            ));
        }
    };
    arguments(method, members).map_err(|detail| RpcError::new(code, format!("{text}: {detail}")))
}

fn arguments(method: &Method, members: &[(String, Value)]) -> Result<Args, String> {
    let mut args = Args::default();
    let mut seen: Vec<&str> = Vec::new();
    for (key, value) in members {
        if seen.contains(&key.as_str()) {
            return Err(format!("parameter {key} is given twice"));
        }
        seen.push(key);
        let param = parameter(method, key)?;
        let value = convert(param, key, value)?;
        match args.get(param.name) {
            Some(earlier) if *earlier != value => {
                return Err(format!(
                    "parameter {key} contradicts {}, another name for it",
                    param.name
                ));
            }
            Some(_) => {}
            None => args.0.push((param.name, value)),
        }
    }
    match method
        .params
        .iter()
        .find(|param| param.mandatory && args.get(param.name).is_none())
    {
        Some(param) => Err(format!("parameter {} is missing", param.name)),
        None => Ok(args),
    }
}

fn parameter<'a>(method: &'a Method, key: &str) -> Result<&'a Param, String> {
    let known = |param: &&Param| param.name == key || param.aliases.contains(&key);
    // A parameter's own name wins over the alias of another one.
    let exact = method.params.iter().find(|param| param.name == key);
    exact
        .or_else(|| method.params.iter().find(known))
        .ok_or_else(|| {
            let names: Vec<&str> = method.params.iter().map(|param| param.name).collect();
            let names = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            };
            format!(
                "there is no parameter {key}; the parameters of {} are {names}",
                method.name
            )
        })
}

fn convert(param: &Param, key: &str, value: &Value) -> Result<Value, String> {
    let number = |least: f64, most: f64| match value {
        Value::Number(number) => number
            .as_f64()
            .filter(|number| number.fract() == 0.0 && *number >= least && *number <= most)
            .map(|number| Value::from(number as i64)),
        _ => None,
    };
    let (converted, expected) = match param.kind {
        Kind::Text => (
            value
                .as_str()
                .filter(|text| !text.contains('\0'))
                .map(Value::from),
            "a string without NUL",
        ),
        Kind::Number => (
            number(0.0, f64::from(u32::MAX)),
            "a number from 0 to 4294967295",
        ),
        Kind::Big => (value.as_u64().map(Value::from), "a number from 0 on"),
        Kind::Signed => (
            number(f64::from(i32::MIN), f64::from(i32::MAX)),
            "a whole number",
        ),
        Kind::Flag => (value.as_bool().map(Value::from), "true or false"),
        Kind::OldFlag => {
            let old = value
                .as_u64()
                .filter(|number| *number <= 1)
                .map(|number| number == 1);
            (
                value.as_bool().or(old).map(Value::from),
                "true, false, 0 or 1",
            )
        }
    };
    converted.ok_or_else(|| format!("parameter {key} must be {expected}, not {value}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::table;
    use super::*;

    fn decoded(method: &str, params: &str) -> Result<Args, (i32, String)> {
        let method = table::find(method).expect("a method of the table");
        let params: Params = serde_json::from_str(params).expect("JSON");
        decode(method, &params).map_err(|error| (error.code, error.message))
    }

    #[test]
    fn aliases_give_the_same_argument_and_contradictions_are_refused() {
        let args = decoded(
            "fsdev_aio_create",
            r#"{"name":"a","root_path":"/","max_write":65536,"xattr_enabled":1}"#,
        )
        .unwrap();
        assert_eq!(args.number("max_xfer_size"), Some(65536));
        assert_eq!(args.flag("enable_xattr"), Some(true));
        assert!(
            decoded(
                "fsdev_aio_create",
                r#"{"name":"a","root_path":"/","max_write":5,"max_xfer_size":5}"#
            )
            .is_ok()
        );
        let (code, message) = decoded(
            "fsdev_aio_create",
            r#"{"name":"a","root_path":"/","max_write":5,"max_xfer_size":6}"#,
        )
        .unwrap_err();
        assert_eq!(code, -32602);
        assert!(
            message.starts_with("spdk_json_decode_object failed"),
            "{message}"
        );
        assert!(message.contains("max_xfer_size"), "{message}");
    }

    #[test]
    fn wrong_parameters_are_refused_with_the_text_of_their_method() {
        let cases = [
            (
                "virtio_fs_transport_create",
                "{}",
                -32602,
                "Invalid parameters",
                "transport_name",
            ),
            (
                "virtio_fs_transport_create",
                "[]",
                -32602,
                "Invalid parameters",
                "object",
            ),
            (
                "virtio_fs_transport_create",
                r#"{"transport_name":7}"#,
                -32602,
                "Invalid parameters",
                "string",
            ),
            (
                "virtio_fs_transport_create",
                r#"{"transport_name":"a\u0000"}"#,
                -32602,
                "Invalid parameters",
                "NUL",
            ),
            (
                "virtio_fs_transport_create",
                r#"{"transport_name":"DOCA","x":1}"#,
                -32602,
                "Invalid parameters",
                "x",
            ),
            (
                "virtio_fs_device_start",
                r#"{"dev_name":"a","dev_name":"a"}"#,
                -32602,
                "Invalid parameters",
                "twice",
            ),
            (
                "virtio_fs_device_modify",
                r#"{"dev_name":"a","queue_size":-1}"#,
                -32602,
                "Invalid parameters",
                "queue_size",
            ),
            (
                "virtio_fs_device_modify",
                r#"{"dev_name":"a","queue_size":1.5}"#,
                -32602,
                "Invalid parameters",
                "queue_size",
            ),
            (
                "virtio_fs_device_modify",
                r#"{"dev_name":"a","queue_size":4294967296}"#,
                -32602,
                "Invalid parameters",
                "queue_size",
            ),
            (
                "virtio_fs_device_modify",
                r#"{"dev_name":"a","packed_vq":1}"#,
                -32602,
                "Invalid parameters",
                "packed_vq",
            ),
            (
                "fsdev_get_fsdevs",
                r#"{"bogus":1}"#,
                -32603,
                "spdk_json_decode_object failed",
                "bogus",
            ),
            (
                "fsdev_get_opts",
                "{}",
                -32602,
                "'fsdev_get_opts' requires no arguments",
                "",
            ),
            (
                "spdk_get_version",
                "[]",
                -32602,
                "spdk_get_version method requires no parameters",
                "",
            ),
            (
                "framework_get_config",
                "{}",
                -32602,
                "Invalid arguments",
                "name",
            ),
        ];
        for (method, params, code, prefix, culprit) in cases {
            let (actual, message) = decoded(method, params).expect_err(method);
            assert_eq!(actual, code, "{method} {params}");
            assert!(
                message.starts_with(prefix) && message.contains(culprit),
                "{method} {params}: {message}"
            );
        }
    }

    #[test]
    fn absent_parameters_are_fine_where_all_are_optional() {
        assert_eq!(
            decoded("virtio_fs_get_devices", "null"),
            Ok(Args::default())
        );
        assert_eq!(decoded("virtio_fs_get_devices", "{}"), Ok(Args::default()));
        assert_eq!(
            decoded("framework_wait_init", r#"{"anything":1}"#),
            Ok(Args::default())
        );
        assert_eq!(
            decoded("virtio_fs_doca_get_managers", "{}"),
            Ok(Args::default())
        );
    }

    #[test]
    fn a_name_means_the_device_where_a_method_has_a_device() {
        let args = decoded(
            "virtio_fs_device_create",
            r#"{"transport_name":"DOCA","name":"d"}"#,
        )
        .unwrap();
        assert_eq!(args.required("dev_name"), "d");
        assert_eq!(args.get("transport_name"), Some(&json!("DOCA")));
    }
}
