//! `--share tag=TAG,path=DIR[,ro][,window=SIZE][,dax=POLICY][,prefault=PAGES][,cache=MODE]`. A comma in a value is written twice.

use std::path::PathBuf;

use devices::text::unknown;
use devices::virtio::fs::CacheMode;
use devices::virtio::fs::policy::{Prefault, UnknownPolicy, UnknownPrefault};

use crate::config::{DaxConfig, ShareConfig, parse_tag, parse_window, split_options};

const KEYS: [&str; 7] = ["tag", "path", "ro", "window", "dax", "prefault", "cache"];

/// Parses the value of `--share`.
pub fn parse_share(text: &str) -> Result<ShareConfig, String> {
    let (mut tag, mut path) = (None, None);
    let (mut read_only, mut window, mut dax) = (false, None, DaxConfig::default());
    let (mut prefault, mut cache) = (Prefault::default(), CacheMode::default());
    let mut given = Given::default();
    for part in split_options(text) {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (&*part, None),
        };
        given.once(key)?;
        let value = |example: &str| {
            let given = value.filter(|value| !value.is_empty());
            given.ok_or_else(|| format!("`{key}` needs a value, for example {key}={example}"))
        };
        match key {
            "tag" => tag = Some(parse_tag(value("src")?)?),
            "path" => path = Some(PathBuf::from(value("/srv/data")?)),
            "ro" => match part.as_str() {
                "ro" => read_only = true,
                _ => return Err("`ro` takes no value".into()),
            },
            "window" => window = Some(parse_window(value("256M")?)?),
            "dax" => dax = value("auto")?.parse().map_err(|error: UnknownPolicy| error.to_string())?,
            "prefault" => prefault = parse_prefault(value("cached")?)?,
            "cache" => cache = parse_cache(value("auto")?)?,
            _ => {
                let unknown = unknown("key", key, &KEYS);
                return Err(format!("{unknown}; a comma in a path is written twice (`,,`)"));
            }
        }
    }
    let missing = |key: &str| {
        format!(
            "a share needs `{key}`: tag=TAG,path=DIR[,ro][,window=SIZE][,dax=POLICY][,prefault=PAGES][,cache=MODE]"
        )
    };
    Ok(ShareConfig {
        tag: tag.ok_or_else(|| missing("tag"))?,
        path: path.ok_or_else(|| missing("path"))?,
        read_only,
        window,
        dax,
        prefault,
        cache,
    })
}

/// What an option has been given, each of which it takes once.
#[derive(Default)]
pub(super) struct Given(Vec<String>);

impl Given {
    /// Notes a key.
    pub(super) fn once(&mut self, key: &str) -> Result<(), String> {
        if self.0.iter().any(|other| other == key) {
            return Err(format!("`{key}` is given twice: leave one of them out"));
        }
        self.0.push(key.to_owned());
        Ok(())
    }
}

/// Parses the value of `prefault`.
pub(super) fn parse_prefault(text: &str) -> Result<Prefault, String> {
    text.parse().map_err(|error: UnknownPrefault| error.to_string())
}

fn parse_cache(text: &str) -> Result<CacheMode, String> {
    text.parse().map_err(|_| unknown("cache mode", text, &["never", "none", "auto", "metadata", "always"]))
}

#[cfg(test)]
mod tests {
    use devices::virtio::fs::policy::Policy;

    use super::*;

    #[test]
    fn a_share_with_everything() {
        let share = parse_share("tag=src,path=/a=b,ro,window=64M,dax=never,prefault=all,cache=none").unwrap();
        assert_eq!((share.tag.as_str(), share.path.to_str()), ("src", Some("/a=b")));
        assert_eq!(
            (share.read_only, share.window, share.dax),
            (true, Some(64 << 20), DaxConfig::Named(Policy::Never))
        );
        assert_eq!((share.prefault, share.cache), (Prefault::All, CacheMode::Never));
        assert_eq!(parse_share("tag=src,path=/a,,b,ro").unwrap().path.to_str(), Some("/a,b"));
        let share = parse_share("tag=src,path=/").unwrap();
        assert_eq!((share.prefault, share.cache), (Prefault::Cached, CacheMode::Auto));
    }

    #[test]
    fn policies_have_names_or_lie_in_files() {
        let dax = |text: &str| parse_share(&format!("tag=a,path=/,dax={text}")).unwrap().dax;
        for name in ["never", "always", "inode", "size", "size:64K", "auto"] {
            assert_eq!(dax(name), DaxConfig::Named(name.parse().unwrap()));
        }
        assert_eq!(dax("ci.toml"), DaxConfig::File("ci.toml".into()));
    }

    #[test]
    fn mistakes_are_named_with_the_remedy() {
        for (text, says) in [
            ("tga=src,path=/", "did you mean `tag`"),
            ("tag=src", "needs `path`"),
            ("path=/", "needs `tag`"),
            ("tag=,path=/", "`tag` needs a value"),
            ("tag=a,path=/,ro=1", "takes no value"),
            ("tag=a,path=/,window=lots", "is no size"),
            ("tag=a,path=/,window=33M", "use 32M or 34M"),
            ("tag=a,path=/a,path=/b", "`path` is given twice"),
            ("tag=a,path=/a,b", "written twice (`,,`)"),
            ("tag=a,path=/,dax=alway", "did you mean `always`"),
            ("tag=a,path=/,cache=alway", "did you mean `always`"),
            ("tag=a,path=/,prefault=cache", "did you mean `cached`"),
            ("tag=a,path=/,prefault", "prefault=cached"),
            ("tag=a,path=/,dax=size:x", "`x` is no size"),
            ("tag=a,path=/,readonly", "known are"),
        ] {
            let error = parse_share(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
