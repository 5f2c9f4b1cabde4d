//! Reads the source of the whole project and holds it to the house rules that no compiler knows.

use std::path::{Path, PathBuf};

/// The style asks for files of about 600 lines and functions of about 70.
const FILE_LINES_MAX: usize = 630;
const FUNCTION_LINES_MAX: usize = 80;
const COLUMNS_MAX: usize = 100;

/// The only files that may hold unsafe code: the kernel's interface, the buffers it writes to, and
/// what maps a file as the program does that hashing is compared with.
const UNSAFE_FOLDERS: [&str; 4] = [
    "bench/src/mapped.rs",
    "engine/src/ring/",
    "engine/src/arena.rs",
    "engine/src/device/",
];

/// Crates that do no input and output of their own have no unsafe code at all.
const SAFE_CRATES: [&str; 5] = [
    "hn4/src/lib.rs",
    "proof/src/lib.rs",
    "transport/src/lib.rs",
    "src/lib.rs",
    "src/main.rs",
];

struct Source {
    /// From the root of the project, with slashes.
    name: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files of the project with one of these endings, without build outputs.
fn sources(endings: &[&str]) -> Vec<Source> {
    let mut folders = vec![root().to_owned()];
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                let skipped = name == "target" || name.starts_with(".git") || name == "corpus";
                if !skipped && !path.is_symlink() {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                all.push(source(&path));
            }
        }
    }
    assert!(!all.is_empty(), "there is something to read");
    all
}

fn source(path: &PathBuf) -> Source {
    let bytes = std::fs::read(path).expect("a file");
    let name = path
        .strip_prefix(root())
        .expect("below the root")
        .display()
        .to_string();
    Source {
        name,
        text: String::from_utf8_lossy(&bytes).into_owned(),
    }
}

fn rust() -> Vec<Source> {
    sources(&[".rs"])
}

fn report(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

#[test]
fn files_stay_short_enough_to_be_one_idea() {
    let long = |source: &Source| {
        let lines = source.text.lines().count();
        (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines", source.name))
    };
    let findings: Vec<String> = rust().iter().filter_map(long).collect();
    report(
        &format!("files have at most {FILE_LINES_MAX} lines"),
        &findings,
    );
}

#[test]
fn lines_stay_short_enough_to_be_read_side_by_side() {
    let mut findings = Vec::new();
    for source in rust() {
        for (number, line) in (1..).zip(source.text.lines()) {
            if line.chars().count() > COLUMNS_MAX {
                findings.push(format!("{}:{number}", source.name));
            }
        }
    }
    report("lines have at most 100 columns", &findings);
}

/// Where functions of a rustfmt-formatted file begin and how many lines they have: from the line of
/// `fn` to the closing brace in the same column.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let mut words = code.split(' ').skip_while(|word| {
            matches!(
                *word,
                "pub" | "const" | "async" | "unsafe" | "extern" | "\"C\""
            ) || word.starts_with("pub(")
                || *word == "super)"
                || *word == "crate)"
        });
        if words.next() != Some("fn") {
            continue;
        }
        let closing = format!("{}}}", " ".repeat(indent));
        let end = lines[index..].iter().position(|line| *line == closing);
        // A function without a body, or with one on its own line, has no such brace before a `;`.
        let is_declared = line.ends_with(';') || line.ends_with('}');
        if let Some(end) = end.filter(|_| !is_declared) {
            found.push((index + 1, end + 1));
        }
    }
    found
}

#[test]
fn functions_fit_on_a_screen() {
    let mut findings = Vec::new();
    for source in rust() {
        for (line, lines) in functions(&source.text) {
            if lines > FUNCTION_LINES_MAX {
                findings.push(format!("{}:{line}: {lines} lines", source.name));
            }
        }
    }
    report(
        &format!("functions have at most {FUNCTION_LINES_MAX} lines"),
        &findings,
    );
}

#[test]
fn functions_are_measured_from_their_first_line_to_their_brace() {
    let text = "pub(super) fn a() {\n    b();\n}\n\nfn c();\n\
                impl D {\n    async fn e(\n    ) {\n    }\n}\n";
    assert_eq!(functions(text), [(1, 3), (7, 3)]);
}

/// A word that this file must be able to name without holding it.
fn spelled(parts: &[&str]) -> String {
    parts.concat()
}

fn find_words(sources: &[Source], words: &[String]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        for (number, line) in (1..).zip(source.text.lines()) {
            for word in words {
                if line.contains(word.as_str()) {
                    findings.push(format!("{}:{number}: {word}", source.name));
                }
            }
        }
    }
    findings
}

#[test]
fn nothing_is_left_to_be_done_later() {
    let words = [
        ["to", "do!("],
        ["FIX", "ME"],
        ["XX", "X"],
        ["unimple", "mented!("],
        ["db", "g!("],
    ];
    let words: Vec<String> = words.iter().map(|parts| spelled(parts)).collect();
    report(
        "what is not there yet is in an issue",
        &find_words(&rust(), &words),
    );
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    let words = [
        ["/wo", "rk/"],
        ["/ro", "ot/"],
        ["/tmp/tar", "get"],
        ["/ho", "me/"],
    ];
    let words: Vec<String> = words.iter().map(|parts| spelled(parts)).collect();
    let all = sources(&[
        ".rs", ".md", ".toml", ".sh", ".py", ".service", ".yml", ".yaml", "run",
    ]);
    report("no paths of a workplace", &find_words(&all, &words));
}

#[test]
fn every_ignored_test_says_why() {
    let words = [spelled(&["#[ign", "ore]"])];
    report(
        "a reason with each ignored test",
        &find_words(&rust(), &words),
    );
}

#[test]
fn unsafe_code_stands_only_where_the_kernel_is() {
    let mut findings = Vec::new();
    let word = spelled(&["uns", "afe"]);
    let uses = [
        format!("{word} {{"),
        format!("{word} fn"),
        format!("{word} impl"),
    ];
    for source in rust() {
        let allowed = UNSAFE_FOLDERS
            .iter()
            .any(|place| source.name.starts_with(place));
        let is_code = |line: &&str| {
            let code = line.trim_start();
            !code.starts_with("//") && uses.iter().any(|word| code.contains(word.as_str()))
        };
        if !allowed && let Some(line) = source.text.lines().find(is_code) {
            findings.push(format!("{}: {}", source.name, line.trim()));
        }
    }
    report("no unsafe code here", &findings);
    for name in SAFE_CRATES {
        let text = std::fs::read_to_string(root().join(name)).expect("a crate's root");
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{name} forbids unsafe code"
        );
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    let undocumented = |source: &Source| {
        let first = source.text.lines().next().unwrap_or_default();
        (!first.starts_with("//!")).then(|| source.name.clone())
    };
    let findings: Vec<String> = rust().iter().filter_map(undocumented).collect();
    report("a file begins with what it is for", &findings);
}
