//! The little language of `conclave kv txn`: conditions, and operations that look
//! like the commands.

use std::{
    ffi::{OsStr, OsString},
    iter::Peekable,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    slice::Iter,
};

use clap::Parser;
use conclave_client::{Compare, Op, Txn};

use super::{
    args::{DelArgs, GetArgs, PutArgs, TxnArgs},
    delete_of, get_of, put_of,
};
use crate::failure::{Failure, USAGE};

/// An operation, as one would type it.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
enum Operation {
    Put(PutArgs),
    Get(GetArgs),
    Del(DelArgs),
}

/// A transaction from the command line.
pub(super) fn of_args(args: &TxnArgs) -> Result<Txn, Failure> {
    let bytes = |texts: &[OsString]| -> Vec<Vec<u8>> {
        texts.iter().map(|text| text.as_bytes().to_vec()).collect()
    };
    of_lines(
        &bytes(&args.conditions),
        &bytes(&args.then),
        &bytes(&args.otherwise),
    )
}

/// A transaction from text with empty lines between its three parts.
pub(super) fn of_text(text: &[u8]) -> Result<Txn, Failure> {
    let mut parts: [Vec<Vec<u8>>; 3] = Default::default();
    let mut part = 0;
    for line in text.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        match (line.is_empty(), part) {
            (true, _) => part += 1,
            (false, 0..=2) => parts[part].push(line.to_vec()),
            (false, _) => return Err(usage("there are more than three parts")),
        }
    }
    let [conditions, then, otherwise] = &parts;
    of_lines(conditions, then, otherwise)
}

fn of_lines(
    conditions: &[Vec<u8>],
    then: &[Vec<u8>],
    otherwise: &[Vec<u8>],
) -> Result<Txn, Failure> {
    if then.is_empty() && otherwise.is_empty() {
        return Err(usage("there is nothing to do: give operations"));
    }
    let conditions: Vec<Compare> = conditions
        .iter()
        .map(|line| condition(line))
        .collect::<Result<_, _>>()?;
    let operations = |lines: &[Vec<u8>]| {
        let operations = lines.iter().map(|line| operation(line));
        operations.collect::<Result<Vec<Op>, Failure>>()
    };
    Ok(Txn::when(conditions)
        .then(operations(then)?)
        .otherwise(operations(otherwise)?))
}

fn operation(line: &[u8]) -> Result<Op, Failure> {
    let words = words(line)?.into_iter().map(OsString::from_vec);
    let parsed = Operation::try_parse_from(words).map_err(|error| {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default();
        let why = first.strip_prefix("error: ").unwrap_or(first);
        usage(&format!("`{}`: {why}", String::from_utf8_lossy(line)))
    })?;
    Ok(match parsed {
        Operation::Put(put) if put.value.is_none() && !put.keep_value => {
            return Err(usage("a put of a transaction needs its value"));
        }
        Operation::Put(put) => {
            let value = put.value.clone().unwrap_or_default();
            put_of(put, value.into_vec()).into()
        }
        Operation::Get(get) => get_of(&get).into(),
        Operation::Del(del) => delete_of(&del).into(),
    })
}

/// `WHAT(KEY) OP VALUE`, with or without quotes and spaces.
fn condition(line: &[u8]) -> Result<Compare, Failure> {
    let wrong = |why: &str| usage(&format!("`{}`: {why}", String::from_utf8_lossy(line)));
    let form = || wrong("a condition is WHAT(KEY) OP VALUE, such as mod(key) = 17");
    let open = line
        .iter()
        .position(|byte| *byte == b'(')
        .ok_or_else(form)?;
    let what = line[..open].trim_ascii();
    let (key, rest) = operand(&line[open + 1..], b")")?;
    let rest = rest.trim_ascii_start();
    let rest = rest.strip_prefix(b")").ok_or_else(form)?.trim_ascii_start();
    let operators: [&[u8]; 4] = [b"!=", b"=", b"<", b">"];
    let operator = operators.iter().find(|operator| rest.starts_with(operator));
    let operator = *operator.ok_or_else(form)?;
    let (value, rest) = operand(rest[operator.len()..].trim_ascii_start(), b"")?;
    if key.is_empty() || !rest.trim_ascii().is_empty() {
        return Err(form());
    }
    if what == b"value" {
        let compared = Compare::value(key);
        return Ok(match operator {
            b"=" => compared.equals(value),
            b"!=" => compared.differs_from(value),
            b"<" => compared.is_below(value),
            _ => compared.exceeds(value),
        });
    }
    let text = String::from_utf8_lossy(&value).into_owned();
    let (compared, number) = match what {
        b"version" | b"ver" => (Compare::version(key), text.parse().ok()),
        b"create" | b"c" => (Compare::create_revision(key), text.parse().ok()),
        b"mod" | b"m" => (Compare::mod_revision(key), text.parse().ok()),
        b"lease" => {
            let id = u64::from_str_radix(&text, 16).ok();
            (Compare::lease(key), id.map(u64::cast_signed))
        }
        _ => return Err(wrong("WHAT is value, version, create, mod or lease")),
    };
    let number: i64 = number.ok_or_else(|| wrong("VALUE is not a number"))?;
    Ok(match operator {
        b"=" => compared.equals(number),
        b"!=" => compared.differs_from(number),
        b"<" => compared.is_below(number),
        _ => compared.exceeds(number),
    })
}

/// A word, quoted or up to one of these bytes or the end, and what follows.
fn operand<'a>(text: &'a [u8], until: &[u8]) -> Result<(Vec<u8>, &'a [u8]), Failure> {
    let text = text.trim_ascii_start();
    if let Some(quote @ (b'"' | b'\'')) = text.first() {
        let mut bytes = text[1..].iter().peekable();
        let mut word = Vec::new();
        quoted(*quote, &mut bytes, &mut word)?;
        return Ok((word, &text[text.len() - bytes.len()..]));
    }
    let end = text.iter().position(|byte| until.contains(byte));
    let (word, rest) = text.split_at(end.unwrap_or(text.len()));
    Ok((word.trim_ascii().to_vec(), rest))
}

/// Words as in a shell, without its variables.
fn words(line: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = line.iter().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' | b'\'' => quoted(*byte, &mut bytes, word.get_or_insert_default())?,
            byte if byte.is_ascii_whitespace() => words.extend(word.take()),
            byte => word.get_or_insert_default().push(*byte),
        }
    }
    words.extend(word);
    Ok(words)
}

/// Reads to the closing quote. Escapes count in double quotes alone.
fn quoted(
    quote: u8,
    bytes: &mut Peekable<Iter<'_, u8>>,
    word: &mut Vec<u8>,
) -> Result<(), Failure> {
    loop {
        match bytes.next() {
            None => return Err(usage("a quote is not closed")),
            Some(byte) if *byte == quote => return Ok(()),
            Some(b'\\') if quote == b'"' => word.push(escaped(bytes)?),
            Some(byte) => word.push(*byte),
        }
    }
}

fn escaped(bytes: &mut Peekable<Iter<'_, u8>>) -> Result<u8, Failure> {
    match bytes.next() {
        Some(b'n') => Ok(b'\n'),
        Some(b't') => Ok(b'\t'),
        Some(b'x') => {
            let mut digit = || char::from(*bytes.next()?).to_digit(16);
            let byte = digit().zip(digit()).map(|(high, low)| high * 16 + low);
            let byte = byte.and_then(|byte| u8::try_from(byte).ok());
            byte.ok_or_else(|| usage("\\x is followed by two hexadecimal digits"))
        }
        Some(byte @ (b'"' | b'\\')) => Ok(*byte),
        _ => Err(usage("unknown escape in double quotes")),
    }
}

fn usage(text: &str) -> Failure {
    Failure::new(USAGE, text)
}

/// Bytes of an argument.
pub(super) fn bytes_of(text: &OsStr) -> Vec<u8> {
    text.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use conclave_client::{Delete, Get, KeyRange, Put};

    use super::*;

    #[test]
    fn words_are_those_of_a_shell() {
        let read = |line: &str| words(line.as_bytes()).unwrap();
        assert_eq!(read("put a  b"), [&b"put"[..], b"a", b"b"]);
        assert_eq!(
            read(r#"put 'a "b' "c\"\x00\n" ''"#),
            [&b"put"[..], b"a \"b", b"c\"\0\n", b""]
        );
        for bad in ["'a", r#""\q""#, r#""\x1""#, r#""\"#] {
            assert!(words(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn conditions_with_and_without_quotes() {
        let read = |line: &str| condition(line.as_bytes()).unwrap();
        let expected = Compare::mod_revision("a b").equals(17);
        assert_eq!(read("mod(a b)=17"), expected);
        assert_eq!(read(r#"mod("a b") = "17""#), expected);
        assert_eq!(
            read("value('x)y') != 'z w'"),
            Compare::value("x)y").differs_from("z w")
        );
        assert_eq!(
            read("lease(x) = ffffffffffffffff"),
            Compare::lease("x").equals(-1)
        );
        assert_eq!(read("version(x) > 0"), Compare::version("x").exceeds(0));
        assert_eq!(
            read("create(x) < 5"),
            Compare::create_revision("x").is_below(5)
        );
        for bad in [
            "mod(a)",
            "mod a = 1",
            "mod(a) = x",
            "size(a) = 1",
            "mod() = 1",
            "mod(a) ~ 1",
        ] {
            assert!(condition(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_text_has_three_parts() {
        let text = "create(a) = 0\n\nput a \"1 2\" --lease 1f\nget b --prefix\n\ndel a c\n";
        let expected = Txn::when([Compare::create_revision("a").equals(0)])
            .then([
                Op::from(Put::new("a", "1 2").lease(31)),
                Get::new(KeyRange::prefix("b")).into(),
            ])
            .otherwise([Delete::new(KeyRange::between("a", "c"))]);
        assert_eq!(of_text(text.as_bytes()).unwrap(), expected);
        let unconditional = Txn::when([]).then([Delete::new("a")]);
        assert_eq!(of_text(b"\ndel a").unwrap(), unconditional);
        for bad in [
            "",
            "mod(a) = 1\n\n",
            "\nput a",
            "\nfly a",
            "\nget\n",
            "\n\n\n\nget a",
        ] {
            assert!(of_text(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
