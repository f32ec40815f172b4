//! The proxy before a real Redis.

use std::{
    io::{Read, Write},
    thread,
};

use redis::{Client, Connection, cmd, pipe};

use super::*;
use crate::redis::Redis;

const SOON: Duration = Duration::from_secs(10);
const NOT_YET: Duration = Duration::from_millis(60);

fn behind(proxy: &Proxy) -> Connection {
    let client = Client::open(format!("redis://{}/", proxy.address())).unwrap();
    let connection = client.get_connection_with_timeout(SOON).unwrap();
    connection.set_read_timeout(Some(SOON)).unwrap();
    connection
}

fn stands() -> (Redis, Proxy, Connection) {
    let redis = Redis::start().unwrap();
    let proxy = Proxy::start(&redis.address()).unwrap();
    let connection = behind(&proxy);
    (redis, proxy, connection)
}

fn get(connection: &mut Connection, key: &str) -> Option<u64> {
    cmd("GET").arg(key).query(connection).unwrap()
}

#[test]
fn it_forwards_large_pipelines_unchanged() {
    let (_redis, _proxy, mut connection) = stands();
    let value = vec![b'\r'; 300_000];
    let mut commands = pipe();
    for number in 0..40 {
        commands
            .cmd("SET")
            .arg(number)
            .arg(&value)
            .ignore()
            .cmd("GET")
            .arg(number);
    }
    let values: Vec<Vec<u8>> = commands.query(&mut connection).unwrap();
    assert!(values.len() == 40 && values.iter().all(|got| *got == value));
}

#[test]
fn held_it_forwards_nothing_and_released_everything() {
    let (_redis, proxy, mut connection) = stands();
    proxy.hold();
    connection.set_read_timeout(Some(NOT_YET)).unwrap();
    assert!(cmd("PING").exec(&mut connection).unwrap_err().is_timeout());
    connection.set_read_timeout(Some(SOON)).unwrap();
    let held = behind_raw(&proxy);
    proxy.release();
    let mut answer = [0; 7];
    (&held).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"+PONG\r\n");
}

/// A connection on which a PING is under way.
fn behind_raw(proxy: &Proxy) -> TcpStream {
    let mut stream = TcpStream::connect(proxy.address()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(b"*1\r\n$4\r\nPING\r\n").unwrap();
    stream
}

#[test]
fn slow_it_takes_its_time() {
    let (_redis, proxy, mut connection) = stands();
    proxy.slow(Duration::from_millis(80));
    let begun = shared::time::Clock::mono_now();
    cmd("PING").exec(&mut connection).unwrap();
    assert!(shared::time::Clock::mono_now().since(begun) >= Duration::from_millis(160));
}

#[test]
fn cut_connections_end_and_new_ones_are_taken_unless_refused() {
    let (_redis, proxy, mut connection) = stands();
    proxy.cut();
    assert!(
        cmd("PING")
            .exec(&mut connection)
            .unwrap_err()
            .is_connection_dropped()
    );
    cmd("PING").exec(&mut behind(&proxy)).unwrap();
    let mut open = behind(&proxy);
    proxy.refuse();
    let refused = TcpStream::connect(proxy.address()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    cmd("PING").exec(&mut open).unwrap();
    proxy.release();
    crate::eventually(SOON, "a connection again", || {
        TcpStream::connect(proxy.address()).ok()
    });
}

#[test]
fn a_command_is_held_before_redis_has_it_and_what_stood_before_it_is_not() {
    let (redis, proxy, mut connection) = stands();
    let hold = proxy.hold_command("incr");
    let mut direct = redis.connection().unwrap();
    let client = thread::spawn(move || -> (u64, u64) {
        pipe()
            .cmd("SET")
            .arg("a")
            .arg(1)
            .ignore()
            .cmd("INCR")
            .arg("b")
            .cmd("INCR")
            .arg("c")
            .query(&mut connection)
            .unwrap()
    });
    assert!(hold.reached(SOON));
    crate::eventually(SOON, "the command before", || get(&mut direct, "a"));
    assert_eq!(get(&mut direct, "b"), None);
    cmd("PING").exec(&mut behind(&proxy)).unwrap();
    hold.release();
    assert_eq!(client.join().unwrap(), (1, 1));
}

#[test]
fn a_command_is_chosen_by_its_arguments_and_lost_when_cut() {
    let (redis, proxy, mut connection) = stands();
    let hold = proxy.hold_when(|arguments| arguments.get(1) == Some(&&b"wanted"[..]));
    cmd("INCR").arg("other").exec(&mut connection).unwrap();
    assert!(!hold.reached(Duration::ZERO));
    let client = thread::spawn(move || cmd("INCR").arg("wanted").exec(&mut connection));
    assert!(hold.reached(SOON));
    proxy.cut();
    assert!(client.join().unwrap().is_err());
    hold.release();
    let mut direct = redis.connection().unwrap();
    assert_eq!(
        (get(&mut direct, "other"), get(&mut direct, "wanted")),
        (Some(1), None)
    );
}

#[test]
fn a_command_is_executed_and_its_reply_held() {
    let (redis, proxy, mut connection) = stands();
    let hold = proxy.hold_reply("INCR");
    let client = thread::spawn(move || {
        let lost = pipe()
            .cmd("ECHO")
            .arg("x")
            .ignore()
            .cmd("INCR")
            .arg("a")
            .exec(&mut connection);
        lost.map(|()| connection)
    });
    assert!(hold.reached(SOON));
    assert_eq!(get(&mut redis.connection().unwrap(), "a"), Some(1));
    assert!(!client.is_finished());
    proxy.cut();
    assert!(client.join().unwrap().is_err());
    hold.release();

    let hold = proxy.hold_reply("GET");
    let mut connection = behind(&proxy);
    let client = thread::spawn(move || (get(&mut connection, "a"), get(&mut connection, "a")));
    assert!(hold.reached(SOON));
    hold.release();
    assert_eq!(client.join().unwrap(), (Some(1), Some(1)));
}

#[test]
fn all_ends_with_the_proxy_even_what_is_held() {
    let (_redis, proxy, mut connection) = stands();
    let hold = proxy.hold_command("PING");
    let client = thread::spawn(move || cmd("PING").exec(&mut connection));
    assert!(hold.reached(SOON));
    let address = proxy.address();
    drop(proxy);
    assert!(client.join().unwrap().is_err());
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn other_protocols_pass_unread() {
    let echo = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let proxy = Proxy::start(&echo.local_addr().unwrap().to_string()).unwrap();
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    let (mut server, _) = echo.accept().unwrap();
    client.write_all(b"\0\0\0\x04PING").unwrap();
    let mut bytes = [0; 8];
    server.read_exact(&mut bytes).unwrap();
    server.write_all(&bytes).unwrap();
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\0\0\0\x04PING");
}

#[test]
fn a_command_is_held_and_then_its_reply() {
    let (redis, proxy, mut connection) = stands();
    let (before, told) = (proxy.hold_command("INCR"), proxy.hold_reply("INCR"));
    let next = proxy.hold_command("INCR");
    let client = thread::spawn(move || -> u64 {
        let mut increment = cmd("INCR");
        increment.arg("a").query(&mut connection).unwrap()
    });
    let mut direct = redis.connection().unwrap();
    assert!(before.reached(SOON));
    assert_eq!(get(&mut direct, "a"), None);
    before.release();
    assert!(told.reached(SOON));
    assert_eq!(get(&mut direct, "a"), Some(1));
    assert!(
        !next.reached(Duration::ZERO),
        "one of each kind for a command"
    );
    told.release();
    assert_eq!(client.join().unwrap(), 1);
}
