//! Binary `supervisor`.

use shared::exit::Exit;

fn main() -> Exit {
    supervisor::run(std::env::args_os())
}
