use super::*;

#[test]
fn the_first_bytes_cover_every_argument_that_data_follows() {
    assert_eq!(FIRST, 80);
    assert!(FIRST >= size_of::<fuse_in_header>() + size_of::<fuse_batch_forget_in>());
}

#[test]
fn contexts_are_undeclared_only_before_7_38_and_only_where_an_inode_is_made() {
    let speaking = |minor, flags| Protocol { minor, flags };
    for opcode in [
        FUSE_SYMLINK,
        FUSE_MKNOD,
        FUSE_MKDIR,
        FUSE_CREATE,
        FUSE_TMPFILE,
    ] {
        assert!(speaking(37, FUSE_SECURITY_CTX).undeclared_contexts(opcode));
        assert!(!speaking(38, FUSE_SECURITY_CTX).undeclared_contexts(opcode));
        assert!(!speaking(37, 0).undeclared_contexts(opcode));
    }
    assert!(!speaking(37, FUSE_SECURITY_CTX).undeclared_contexts(super::super::abi::FUSE_LINK));
}

#[test]
fn a_context_may_lie_in_an_area_without_padding_at_its_end() {
    let mut area = Vec::new();
    area.extend(27u32.to_le_bytes());
    area.extend(1u32.to_le_bytes());
    area.extend(2u32.to_le_bytes());
    area.extend([0; 4]);
    area.extend(b"user.abc\0vv");
    assert_eq!(area.len(), 27);
    // The padding behind the extension is part of the area, not of the extension.
    assert_eq!(extensions(&area), Err(Errno::EINVAL));
    area.extend([0; 5]);
    let found = extensions(&area).expect("valid");
    assert_eq!(
        found.security_context,
        Some((c"user.abc", b"vv".as_slice()))
    );
}
