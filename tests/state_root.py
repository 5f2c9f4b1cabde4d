#!/usr/bin/env python3
"""Recomputes the root of the state tree from a raw file or device.

This is a second implementation, written from docs/PROOF_FORMAT.md and sharing no code with the
daemon: if both agree on a root, the document says what the daemon does. It prints the root as 64
hexadecimal digits. BLAKE3 is taken from the `blake3` module where that is installed and from the
plain implementation below otherwise (about 100 blocks a second; blocks of zeroes and repeated
blocks cost nothing, and holes of a sparse file are not even read).

    state_root.py FILE            the root
    state_root.py --self-test     compare the plain BLAKE3 with known answers
"""

import os
import sys

BLOCK = 4096
LEAF, NODE, ROOT = ("hn4-replicad v1 state leaf", "hn4-replicad v1 state node",
                    "hn4-replicad v1 state root")

# --- BLAKE3, from its specification -----------------------------------------------------------

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
      0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT_FLAG = 1, 2, 4, 8
DERIVE_KEY_CONTEXT, DERIVE_KEY_MATERIAL = 32, 64
MASK = 0xFFFFFFFF
# Columns, then diagonals.
QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
            (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def words(data):
    return [int.from_bytes(data[at:at + 4], "little") for at in range(0, len(data), 4)]


def compress(chaining, block, counter, length, flags):
    """First eight words of the output: the chaining value, or the hash if ROOT_FLAG is set."""
    v = list(chaining) + list(IV[:4]) + [counter & MASK, counter >> 32, length, flags]
    m = block
    for _ in range(7):
        for at, (a, b, c, d) in enumerate(QUARTERS):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + m[2 * at]) & MASK
            vd ^= va
            vd = vd >> 16 | vd << 16 & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = vb >> 12 | vb << 20 & MASK
            va = (va + vb + m[2 * at + 1]) & MASK
            vd ^= va
            vd = vd >> 8 | vd << 24 & MASK
            vc = (vc + vd) & MASK
            vb ^= vc
            vb = vb >> 7 | vb << 25 & MASK
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
        m = [m[at] for at in ORDER]
    return [v[at] ^ v[at + 8] for at in range(8)]


def chunk_value(key, chunk, counter, flags, is_root):
    value = list(key)
    blocks = max(1, -(-len(chunk) // 64))
    for at in range(blocks):
        block = chunk[64 * at:64 * at + 64]
        here = flags | (CHUNK_START if at == 0 else 0)
        if at == blocks - 1:
            here |= CHUNK_END | (ROOT_FLAG if is_root else 0)
        value = compress(value, words(block.ljust(64, b"\0")), counter, len(block), here)
    return value


def subtree(key, data, counter, flags, is_root):
    if len(data) <= 1024:
        return chunk_value(key, data, counter, flags, is_root)
    left = 1024
    while left * 2 < len(data):
        left *= 2
    pair = (subtree(key, data[:left], counter, flags, False)
            + subtree(key, data[left:], counter + left // 1024, flags, False))
    return compress(key, pair, 0, 64, flags | PARENT | (ROOT_FLAG if is_root else 0))


def plain_derive_key(context, material):
    key = subtree(IV, context.encode(), 0, DERIVE_KEY_CONTEXT, True)
    out = subtree(key, material, 0, DERIVE_KEY_MATERIAL, True)
    return b"".join(word.to_bytes(4, "little") for word in out)


try:
    from blake3 import blake3

    def derive_key(context, material):
        return blake3(material, derive_key_context=context).digest()
except ImportError:
    derive_key = plain_derive_key

# --- The state tree ---------------------------------------------------------------------------


def data_blocks(file, size):
    """Numbers of the blocks that may hold something; holes are left out where that can be told."""
    at = 0
    while at < size:
        start, end = at, size
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
            end = os.lseek(file, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == 6:  # ENXIO: nothing but a hole follows
                return
        first = start // BLOCK
        last = -(-min(end, size) // BLOCK)
        yield from range(max(first, -(-at // BLOCK)), last)
        at = last * BLOCK


def state_root(path):
    file = os.open(path, os.O_RDONLY)
    size = os.lseek(file, 0, os.SEEK_END)
    if size == 0 or size % 512:
        sys.exit(f"{path}: {size} bytes is no volume: whole sectors of 512 bytes are needed")
    height = 0
    while BLOCK << height < size:
        height += 1
    zero = [derive_key(LEAF, bytes(BLOCK))]
    for level in range(height):
        zero.append(derive_key(NODE, zero[level] + zero[level]))
    known = {bytes(BLOCK): zero[0]}
    nodes = {}
    for number in data_blocks(file, size):
        # The last block may be partial: what is missing counts as zeroes.
        wanted = min(BLOCK, size - number * BLOCK)
        block = os.pread(file, wanted, number * BLOCK).ljust(BLOCK, b"\0")
        if block not in known:
            if len(known) > 4096:
                known = {bytes(BLOCK): zero[0]}
            known[block] = derive_key(LEAF, block)
        if known[block] != zero[0]:
            nodes[number] = known[block]
    os.close(file)
    for level in range(height):
        above = {}
        for number in {number >> 1 for number in nodes}:
            left = nodes.get(2 * number, zero[level])
            right = nodes.get(2 * number + 1, zero[level])
            above[number] = derive_key(NODE, left + right)
        nodes = above
    top = nodes.get(0, zero[height])
    return derive_key(ROOT, size.to_bytes(8, "little") + top).hex()


def self_test():
    """Answers for `derive_key` from the official test vectors of BLAKE3."""
    context = "BLAKE3 2019-12-27 16:29:52 test vectors context"
    expected = {
        0: "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d",
        1: "b3e2e340a117a499c6cf2398a19ee0d29cca2bb7404c73063382693bf66cb06c",
    }
    for length, answer in expected.items():
        data = bytes(at % 251 for at in range(length))
        found = plain_derive_key(context, data).hex()
        if found != answer:
            sys.exit(f"derive_key of {length} bytes: {found}, expected {answer}")
    for length in (1023, 1024, 1025, 2049, 4096, 7000):
        data = bytes(at % 251 for at in range(length))
        if plain_derive_key(context, data) != derive_key(context, data):
            sys.exit(f"derive_key of {length} bytes differs from the blake3 module")


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        self_test()
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        print(state_root(sys.argv[1]))
    else:
        sys.exit(__doc__)
