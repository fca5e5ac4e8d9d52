use proptest::collection::vec;
use proptest::prelude::Just;
use proptest::prelude::Strategy;
use proptest::prelude::any;
use proptest::prop_assert;
use proptest::prop_assert_eq;
use proptest::prop_oneof;
use proptest::proptest;

use super::*;

fn feed(bytes: &[u8]) -> Vec<Result<Request, Rejection>> {
    let mut framer = Framer::default();
    framer.push(bytes);
    drain(&mut framer)
}

fn drain(framer: &mut Framer) -> Vec<Result<Request, Rejection>> {
    let mut all = Vec::new();
    while let Some(next) = framer.next_request() {
        let fatal = next.as_ref().is_err_and(|rejection| rejection.fatal);
        all.push(next);
        if fatal {
            break;
        }
    }
    all
}

fn only(text: &str) -> Result<Request, Rejection> {
    let mut all = feed(text.as_bytes());
    assert_eq!(all.len(), 1, "{text}");
    all.remove(0)
}

#[test]
fn requests_follow_one_another_with_and_without_blanks() {
    let text = " \r\n\t{\"id\":1,\"method\":\"a\"}{\"id\":2,\"method\":\"b\",\"params\":null}\n{\"id\":\"3\",\"method\":\"c\"}\n";
    let methods: Vec<(String, String)> = feed(text.as_bytes())
        .into_iter()
        .map(|request| request.map(|request| (request.id, request.method)).unwrap())
        .collect();
    let expected = [("1", "a"), ("2", "b"), ("\"3\"", "c")]
        .map(|(id, method)| (id.to_owned(), method.to_owned()));
    assert_eq!(methods, expected);
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let text = br#"{"jsonrpc":"2.0","id":7,"method":"m","params":{"a":"}]{\"\\"}}"#;
    let mut framer = Framer::default();
    for (position, byte) in text.iter().enumerate() {
        assert!(
            framer.next_request().is_none(),
            "complete after {position} bytes"
        );
        framer.push(&[*byte]);
    }
    let request = framer.next_request().unwrap().unwrap();
    assert_eq!(
        request.params,
        Params::Object(vec![("a".to_owned(), Value::from("}]{\"\\"))])
    );
    assert!(framer.next_request().is_none());
}

#[test]
fn ids_are_echoed_as_they_were_written() {
    for (raw, echoed) in [
        ("1", "1"),
        ("-3", "-3"),
        ("1.5", "1.5"),
        (
            "123456789012345678901234567890",
            "123456789012345678901234567890",
        ),
        ("null", "null"),
        (r#""\u0061\"b""#, r#""a\"b""#),
    ] {
        let request = only(&format!(r#"{{"jsonrpc":"2.0","id":{raw},"method":"m"}}"#)).unwrap();
        assert_eq!(request.id, echoed, "{raw}");
    }
    assert_eq!(only(r#"{"method":"m"}"#).unwrap().id, "null");
}

#[test]
fn a_wrong_envelope_is_answered_and_the_connection_goes_on() {
    let long_id = format!(r#"{{"id":"{}","method":"m"}}"#, "x".repeat(MAX_ID));
    for (text, id) in [
        (r#"{"id":true,"method":"m"}"#, "null"),
        (r#"{"id":[1],"method":"m"}"#, "null"),
        (r#"{"id":{"a":1},"method":"m"}"#, "null"),
        (r#"{"jsonrpc":"1.0","id":1,"method":"m"}"#, "null"),
        (r#"{"jsonrpc":2.0,"id":1,"method":"m"}"#, "null"),
        (r#"{"id":1}"#, "null"),
        (r#"{"id":1,"method":5}"#, "null"),
        (r#"{"id":1,"method":"m","params":5}"#, "1"),
        (r#"{"id":1,"method":"m","params":"x"}"#, "1"),
        (r#"{"id":1,"method":"m","extra":1}"#, "null"),
        (r#"{"id":1,"id":2,"method":"m"}"#, "null"),
        (&long_id, "null"),
        ("{}", "null"),
        ("[]", "null"),
        (r#"[{"id":1,"method":"m"},5]"#, "null"),
        ("5", "null"),
        ("5 ", "null"),
        ("\"x\"", "null"),
        ("null", "null"),
    ] {
        let rejection = only(text).expect_err(text);
        assert_eq!(rejection.error.code, -32600, "{text}");
        assert!(
            rejection.error.message.starts_with("Invalid request"),
            "{text}"
        );
        assert!(!rejection.fatal, "{text}");
        assert_eq!(rejection.id, id, "{text}");
    }
}

#[test]
fn what_is_not_json_ends_the_stream() {
    for text in [
        r#"{"id":1,"method":spdk}"#,
        "not json at all",
        r#"{"id":1,"method":"m",}"#,
        "\0{\"id\":1,\"method\":\"m\"}",
        "// c\n{\"id\":1,\"method\":\"m\"}",
        r#"{"id":1,/*c*/"method":"m"}"#,
        "[1,}",
        "}",
        "{]",
    ] {
        let rejection = only(text).expect_err(text);
        assert_eq!(rejection.error.code, -32700, "{text}");
        assert!(rejection.fatal, "{text}");
    }
    let rejection = feed(b"{\"id\":1,\"method\":\"a\xff\"}")
        .remove(0)
        .unwrap_err();
    assert_eq!(rejection.error.code, -32700);
}

#[test]
fn a_request_of_the_largest_size_passes_and_one_byte_more_does_not() {
    let frame = |length: usize| {
        let empty = r#"{"id":1,"method":"m","params":{"a":""}}"#;
        empty.replace(
            r#""a":"""#,
            &format!(r#""a":"{}""#, "x".repeat(length - empty.len())),
        )
    };
    assert!(only(&frame(MAX_REQUEST)).is_ok());
    let rejection = only(&frame(MAX_REQUEST + 1)).unwrap_err();
    assert_eq!((rejection.error.code, rejection.fatal), (-32600, true));
    // An unfinished request does not grow beyond the limit either.
    let rejection = only(&format!("{{\"a\":\"{}", "x".repeat(MAX_REQUEST))).unwrap_err();
    assert_eq!((rejection.error.code, rejection.fatal), (-32600, true));
}

#[test]
fn too_many_values_end_the_stream() {
    let frame = |values: usize| {
        format!(
            r#"{{"id":1,"method":"m","params":{{"a":[{}]}}}}"#,
            vec!["1"; values].join(",")
        )
    };
    assert!(only(&frame(1000)).is_ok());
    let rejection = only(&frame(1024)).unwrap_err();
    assert_eq!((rejection.error.code, rejection.fatal), (-32700, true));
}

#[test]
fn deep_nesting_is_refused_without_overflow() {
    let deep = format!("{}1{}", "{\"a\":".repeat(200), "}".repeat(200));
    let rejection = only(&format!("{{\"id\":1,\"method\":\"m\",\"params\":{deep}}}")).unwrap_err();
    assert_eq!((rejection.error.code, rejection.fatal), (-32600, false));
}

#[test]
fn responses_have_either_a_result_or_an_error() {
    let good = response("1", &Ok(Value::Bool(true)));
    assert_eq!(good, b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":true}\n");
    let bad = response("null", &Err(RpcError::new(-19, "No such device: \"x\"")));
    assert_eq!(bad, b"{\"jsonrpc\":\"2.0\",\"id\":null,\"error\":{\"code\":-19,\"message\":\"No such device: \\\"x\\\"\"}}\n");
}

/// Requests and things that are none, each ending with a bracket, so that fragments cannot change their meaning.
fn pieces() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(
            r#"{"id":1,"method":"a","params":{"x":[1,"]}\"",{}]}}"#
                .as_bytes()
                .to_vec()
        ),
        Just(b" \r\n".to_vec()),
        Just(b"[{},5]".to_vec()),
        Just(b"{\"id\":{}}".to_vec()),
        Just(b"{\"id\":nonsense}".to_vec()),
        Just(b"{\"open\":\"".to_vec()),
    ];
    vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn fragments_mean_the_same_as_the_whole(bytes in pieces(), cuts in vec(1usize..9, 1..40)) {
        let whole = feed(&bytes);
        let mut framer = Framer::default();
        let mut all = Vec::new();
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            framer.push(head);
            all.extend(drain(&mut framer));
            rest = tail;
            let ended = all.last().is_some_and(|last| last.as_ref().is_err_and(|rejection| rejection.fatal));
            if rest.is_empty() || ended {
                break;
            }
        }
        prop_assert_eq!(all, whole);
    }

    #[test]
    fn no_bytes_make_it_panic_or_loop(bytes in vec(prop_oneof![any::<u8>(), Just(b'{'), Just(b'"'), Just(b'}')], 0..200)) {
        let requests = feed(&bytes);
        prop_assert!(requests.len() <= bytes.len());
    }
}
