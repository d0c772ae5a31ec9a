//! `--root DIR[,rw|ro|overlay][,dax=POLICY][,window=SIZE][,prefault=PAGES]` and `--disk FILE[,ro]`.

use devices::text::unknown;
use devices::virtio::fs::policy::UnknownPolicy;

use super::share::{Given, parse_prefault};
use crate::config::{DiskConfig, RootConfig, parse_window, split_options};
use crate::guest::protocol::RootMode;

const COMMA: &str = "a comma in a path is written twice (`,,`)";

/// Parses the value of `--root`.
pub fn parse_root(text: &str) -> Result<RootConfig, String> {
    let mut options = split_options(text).into_iter();
    let path = options.next().filter(|path| !path.is_empty());
    let path =
        path.ok_or("give a directory: DIR[,rw|ro|overlay][,dax=POLICY][,window=SIZE][,prefault=PAGES]")?;
    let mut root = RootConfig { path: path.into(), ..RootConfig::default() };
    let mut given = Given::default();
    for option in options {
        given.once(match option.split_once('=') {
            Some((key, _)) => key,
            None => "mode",
        })?;
        match option.split_once('=') {
            None if option == "rw" => root.mode = RootMode::Rw,
            None if option == "ro" => root.mode = RootMode::Ro,
            None if option == "overlay" => root.mode = RootMode::Overlay,
            Some(("dax", policy)) => {
                root.dax = Some(policy.parse().map_err(|error: UnknownPolicy| error.to_string())?);
            }
            Some(("window", size)) => root.window = Some(parse_window(size)?),
            Some(("prefault", pages)) => root.prefault = Some(parse_prefault(pages)?),
            Some((key, _)) => {
                return Err(format!("{}; {COMMA}", unknown("key", key, &["dax", "window", "prefault"])));
            }
            None => {
                let known = ["rw", "ro", "overlay", "dax", "window", "prefault"];
                return Err(format!("{}; {COMMA}", unknown("option", &option, &known)));
            }
        }
    }
    Ok(root)
}

/// Parses the value of `--disk`.
pub fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut options = split_options(text).into_iter();
    let path = options.next().filter(|path| !path.is_empty()).ok_or("give a file: FILE[,ro]")?;
    let mut read_only = false;
    for option in options {
        match option.as_str() {
            "ro" => read_only = true,
            other => return Err(format!("{}; {COMMA}", unknown("option", other, &["ro"]))),
        }
    }
    Ok(DiskConfig { path: path.into(), read_only })
}

#[cfg(test)]
mod tests {
    use devices::virtio::fs::policy::Prefault;

    use super::*;

    #[test]
    fn a_root_with_everything() {
        let root = parse_root("/srv/a,,b,rw,dax=size:64K,window=64M,prefault=never").unwrap();
        assert_eq!((root.path.to_str(), root.mode), (Some("/srv/a,b"), RootMode::Rw));
        assert_eq!((root.dax, root.window), (Some("size:64K".parse().unwrap()), Some(64 << 20)));
        assert_eq!(root.prefault, Some(Prefault::Never));
        assert_eq!(
            parse_root("debian").unwrap(),
            RootConfig { path: "debian".into(), ..RootConfig::default() }
        );
        assert_eq!(parse_root("/,ro").unwrap().mode, RootMode::Ro);
        assert_eq!(parse_root("/,overlay").unwrap().mode, RootMode::Overlay);
    }

    #[test]
    fn a_disk() {
        let disk = |path: &str, read_only| DiskConfig { path: path.into(), read_only };
        assert_eq!(parse_disk("a.img"), Ok(disk("a.img", false)));
        assert_eq!(parse_disk("a,,b.img,ro"), Ok(disk("a,b.img", true)));
    }

    #[test]
    fn mistakes_are_named_with_the_remedy() {
        for (text, says) in [
            ("", "give a directory"),
            (",rw", "give a directory"),
            ("/,rww", "did you mean `rw`"),
            ("/,ro,rw", "`mode` is given twice"),
            ("/,dax=never,dax=never", "`dax` is given twice"),
            ("/srv/a,b", "written twice (`,,`)"),
            ("/,windo=32M", "did you mean `window`"),
            ("/,window=33M", "use 32M or 34M"),
            ("/,dax=alway", "did you mean `always`"),
            ("/,prefault=al", "did you mean `all`"),
        ] {
            let error = parse_root(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        for (text, says) in
            [("", "give a file"), ("a.img,rw", "did you mean `ro`"), ("a,b", "written twice (`,,`)")]
        {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
