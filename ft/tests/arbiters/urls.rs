//! How arbiters are written.

use ft::arbiter::{ArbiterUrl, BadArbiter, Endpoint};

#[test]
fn urls_are_read_and_written() {
    for (text, written) in [
        ("file:/shared", "file:/shared"),
        ("file:///shared/dir", "file:/shared/dir"),
        ("etcd:a:1", "etcd:a:1"),
        ("etcd://a:1", "etcd:a:1"),
        ("etcd:[a:1,b.example:2,10.0.0.3:3]", "etcd:a:1,b.example:2,10.0.0.3:3"),
        ("etcd:[fe80::1]:2379", "etcd:[fe80::1]:2379"),
        ("etcd:[[::1]:1, b:2]", "etcd:[::1]:1,b:2"),
        ("etcd:[::1]:1,[::2]:2", "etcd:[::1]:1,[::2]:2"),
    ] {
        let url: ArbiterUrl = text.parse().expect(text);
        assert_eq!(url.to_string(), written, "{text}");
        assert_eq!(written.parse::<ArbiterUrl>(), Ok(url));
    }
    let ArbiterUrl::Etcd(endpoints) = "etcd:[::1]:9,h:8".parse().expect("a URL") else {
        panic!("not etcd")
    };
    let expected = [("::1", 9), ("h", 8)].map(|(host, port)| Endpoint { host: host.into(), port });
    assert_eq!(endpoints, expected);
}

#[test]
fn bad_urls_are_refused_and_say_what_would_do() {
    let many = format!("etcd:{}", vec!["h:1"; 17].join(","));
    for (text, word) in [
        ("dir:/tmp", "file:DIR"),
        ("", "etcd:HOST:PORT"),
        ("/shared", "file:DIR"),
        ("file:relative", "absolute"),
        ("file:", "absolute"),
        ("etcd:", "HOST:PORT"),
        ("etcd:h", "HOST:PORT"),
        ("etcd:h:0", "HOST:PORT"),
        ("etcd:h:65536", "HOST:PORT"),
        ("etcd:h:1,", "HOST:PORT"),
        ("etcd:h:1,,i:2", "HOST:PORT"),
        ("etcd:http://h:2379", "HOST:PORT"),
        ("etcd:user@h:2379", "HOST:PORT"),
        ("etcd:h:1/v3", "HOST:PORT"),
        ("etcd:fe80::1:2379", "HOST:PORT"),
        ("etcd:[nonsense]:1", "HOST:PORT"),
        (&many, "16"),
    ] {
        let error: BadArbiter = text.parse::<ArbiterUrl>().expect_err(text);
        assert!(error.to_string().contains(word), "{text}: {error}");
    }
}
