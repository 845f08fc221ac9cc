//! The borders of the rooms (DESIGN.md §2): a room imports only rooms on a lower floor, and the rooms
//! of floor 1 are pure.
#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Floor of each room, as lib.rs lists them.
fn floors() -> BTreeMap<String, u32> {
    let text = fs::read_to_string(source().join("lib.rs")).unwrap();
    let mut floor = None;
    let mut rooms = BTreeMap::new();
    for line in text.lines() {
        if let Some(number) = line.strip_prefix("// floor ") {
            floor = Some(number.trim().parse().unwrap());
        } else if let Some(room) = line.strip_prefix("pub mod ") {
            let room = room.trim_end_matches(';').to_owned();
            rooms.insert(room, floor.expect("a floor stands above each room"));
        }
    }
    rooms
}

/// Every Rust file of a room.
fn files(room: &str) -> Vec<PathBuf> {
    let mut open = vec![source().join(room)];
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The text without line comments, so that a doc link is no import.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| {
        if line.trim_start().starts_with("//") {
            ""
        } else {
            line
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// First names behind every `crate::`, also in `crate::{a::…, b}`.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        let before = code[..start].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[start + "crate::".len()..];
        let name = |text: &str| -> String {
            let text = text.trim_start();
            text.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let Some(group) = rest.strip_prefix('{') else {
            found.push(name(rest));
            continue;
        };
        let mut depth = 0_usize;
        let mut entry = 0;
        for (place, character) in group.char_indices() {
            match character {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    found.push(name(&group[entry..]));
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.push(name(&group[entry..]));
                    entry = place + 1;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn imports_are_found_in_every_form() {
    let code = "use crate::model::ids;\nuse crate::{fleet::{a, b},\n transfer};\nlet x = crate::health::f();";
    let mut names = imports(code);
    names.retain(|name| !name.is_empty());
    assert_eq!(names, ["model", "fleet", "transfer", "health"]);
}

#[test]
fn a_room_imports_only_rooms_on_a_lower_floor() {
    let floors = floors();
    assert!(floors.len() >= 14, "lib.rs lists the rooms: {floors:?}");
    let mut wrong = Vec::new();
    for (room, floor) in &floors {
        for path in files(room) {
            for other in imports(&code(&path)) {
                let Some(below) = floors.get(&other) else {
                    continue;
                };
                // The words (`model`) are the ground of the whole house, floor 1 included.
                // The daemon serves the API that stands on its floor, never the other way.
                let serves = room == "daemon" && other == "api";
                if other != *room && other != "model" && !serves && below >= floor {
                    wrong.push(format!(
                        "{}: {room} (floor {floor}) imports {other} (floor {below})",
                        path.display()
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_model_imports_no_other_room() {
    let floors = floors();
    for path in files("model") {
        for other in imports(&code(&path)) {
            assert!(
                other == "model" || !floors.contains_key(&other),
                "{}: model imports {other}",
                path.display()
            );
        }
    }
}

#[test]
fn the_rooms_of_floor_1_open_no_file_read_no_clock_and_spawn_no_task() {
    const FORBIDDEN: &[&str] = &[
        "std::fs",
        "std::process",
        "std::thread",
        "TcpStream",
        "TcpListener",
        "UdpSocket",
        "UnixStream",
        "tokio",
        "SystemTime",
        "Instant::now",
    ];
    let mut wrong = Vec::new();
    let mut looked_at = 0;
    for (room, _) in floors().iter().filter(|(_, floor)| **floor == 1) {
        for path in files(room) {
            looked_at += 1;
            let code = code(&path);
            for word in FORBIDDEN.iter().filter(|word| code.contains(**word)) {
                wrong.push(format!("{}: {word}", path.display()));
            }
        }
    }
    assert!(looked_at > 10, "only {looked_at} files found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
