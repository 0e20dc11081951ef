//! Typed client of the REST API that every `dyad` process serves on a Unix socket.
