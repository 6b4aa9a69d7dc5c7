"""Device code of one merge, forward and backward, see ``fused_merge``.

A program holds ``TOKENS`` rows of D features as chunks of ``WIDTH`` features, and passes once over its rows.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# (kernels have no types, and their tuples grow)

import triton
import triton.language as tl


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _mask(row, column, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a chunk exist; None where all do."""
    if D % WIDTH == 0:
        mask = None if TOKENS == 1 else (row < tokens)[:, None]
    else:
        mask = (column < D)[None, :]
        if TOKENS > 1:
            mask = mask & (row < tokens)[:, None]
    return mask


@triton.jit
def _load(
    pointer, start: tl.constexpr, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr
):
    """A chunk of rows of ``[T, D]``: features from ``start`` on, as ``[TOKENS, WIDTH]`` in storage dtype."""
    column = start + tl.arange(0, WIDTH)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    mask = _mask(row, column, tokens, D, TOKENS, WIDTH)
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if mask is None:
        chunk = tl.load(pointer + offset, eviction_policy=POLICY)
    else:
        chunk = tl.load(pointer + offset, mask=mask, other=0.0, eviction_policy=POLICY)
    return chunk


@triton.jit
def _load_all(pointer, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """Whole rows, as a tuple of chunks."""
    chunks = ()
    for start in tl.static_range(0, D, WIDTH):
        chunks += (_load(pointer, start, row, tokens, D, TOKENS, WIDTH, KEEP),)
    return chunks


@triton.jit
def _store(pointer, chunk, start: tl.constexpr, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of :func:`_load`, which rounds to the storage dtype."""
    column = start + tl.arange(0, WIDTH)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(pointer + offset, chunk.to(pointer.dtype.element_ty), mask=_mask(row, column, tokens, D, TOKENS, WIDTH))


@triton.jit
def _features(pointer, start: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk of a parameter ``[D]`` in float32, the same for every row.

    Every row loads it again: it stays in the first-level cache, whereas registers are what limits these kernels.
    """
    # In the shape of rows: a chunk ``[1, WIDTH]`` would get a layout of its own and be exchanged between threads.
    column = tl.broadcast_to((start + tl.arange(0, WIDTH))[None, :], [TOKENS, WIDTH])
    if D % WIDTH == 0:
        chunk = tl.load(pointer + column, eviction_policy="evict_last")
    else:
        chunk = tl.load(pointer + column, mask=column < D, other=0.0, eviction_policy="evict_last")
    return chunk.to(tl.float32)


# `tokens` changes from batch to batch, and `lse` is a row of [S, T] that begins anywhere: neither compiles anew.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["lse"])
def forward(
    partial, branch, mixed, lse, weight, norm_weight, norm_bias,
    total, y, stats,
    tokens, eps, scale, norm_eps,
    D: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = row < tokens
    # All loads stand before the first store, as none is moved across one: that many bytes are in flight.
    all_p = _load_all(partial, row, tokens, D, TOKENS, WIDTH, False)
    if branch is not None:
        all_f = _load_all(branch, row, tokens, D, TOKENS, WIDTH, False)
    all_o = _load_all(mixed, row, tokens, D, TOKENS, WIDTH, False)
    earlier = tl.load(lse + row, mask=present, other=0.0)

    squares = tl.zeros([TOKENS, WIDTH], tl.float32)
    products = tl.zeros([TOKENS, WIDTH], tl.float32)
    sums_x = tl.zeros([TOKENS, WIDTH], tl.float32)
    sums_o = tl.zeros([TOKENS, WIDTH], tl.float32)
    all_x = ()
    for start in tl.static_range(0, D, WIDTH):
        stored = all_p[start // WIDTH]
        if branch is not None:
            # Rounded before it is scored: every other reader of the total sees the rounded value.
            stored = (stored.to(tl.float32) + all_f[start // WIDTH].to(tl.float32)).to(total.dtype.element_ty)
            _store(total, stored, start, row, tokens, D, TOKENS, WIDTH)
        all_x += (stored,)
        x = stored.to(tl.float32)
        squares += x * x
        products += x * _features(weight, start, D, TOKENS, WIDTH)
        if NORM == "layer":
            sums_x += x
            sums_o += all_o[start // WIDTH].to(tl.float32)
    if NORM == "layer":
        square, product, sum_x, sum_o = tl.reduce((squares, products, sums_x, sums_o), 1, _add4)
    else:
        square, product = tl.reduce((squares, products), 1, _add2)
    inverse_rms = tl.rsqrt(square / D + eps)
    score = product * inverse_rms
    m = tl.sigmoid(score - earlier)
    rest = tl.sigmoid(earlier - score)
    tl.store(stats + row, score - earlier, mask=present)
    tl.store(stats + tokens + row, score, mask=present)
    tl.store(stats + 2 * tokens + row, inverse_rms, mask=present)

    if NORM == "layer":
        mean = scale * (rest * sum_o + m * sum_x) / D
        tl.store(stats + 3 * tokens + row, mean, mask=present)
    squares = tl.zeros([TOKENS, WIDTH], tl.float32)
    all_h = ()
    for start in tl.static_range(0, D, WIDTH):
        o = all_o[start // WIDTH].to(tl.float32)
        h = scale * (rest[:, None] * o + m[:, None] * all_x[start // WIDTH].to(tl.float32))
        if NORM == "layer":
            h = h - mean[:, None]
            if start + WIDTH > D:
                h = tl.where((start + tl.arange(0, WIDTH) < D)[None, :], h, 0.0)
        squares += h * h
        all_h += (h,)
    if NORM != "":
        inverse = tl.rsqrt(tl.sum(squares, 1) / D + norm_eps)
        tl.store(stats + (4 if NORM == "layer" else 3) * tokens + row, inverse, mask=present)
    for start in tl.static_range(0, D, WIDTH):
        h = all_h[start // WIDTH]
        if NORM != "":
            h = h * inverse[:, None]
        if norm_weight is not None:
            h = h * _features(norm_weight, start, D, TOKENS, WIDTH)
        if norm_bias is not None:
            h = h + _features(norm_bias, start, D, TOKENS, WIDTH)
        _store(y, h, start, row, tokens, D, TOKENS, WIDTH)


@triton.jit
def _zeros(D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(0, D, WIDTH):
        chunks += (tl.zeros([TOKENS, WIDTH], tl.float32),)
    return chunks


@triton.jit
def _store_sums(sums, chunks, kind: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """This program's row of ``sums`` ``[kinds, programs, D]``."""
    row = (kind * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D
    for start in tl.static_range(0, D, WIDTH):
        column = start + tl.arange(0, WIDTH)
        tl.store(sums + row + column, tl.sum(chunks[start // WIDTH], 0), mask=column < D)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    grad_y, grad_total, total, mixed, weight, norm_weight, norm_bias, stats,
    grad, grad_mixed, grad_lse, sums,
    tokens, scale,
    D: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, REREAD: tl.constexpr,
):  # fmt: skip
    # Sums over this program's rows, which give the gradients of the parameters.
    dw = _zeros(D, TOKENS, WIDTH)
    if norm_weight is not None:
        dg = _zeros(D, TOKENS, WIDTH)
    if norm_bias is not None:
        db = _zeros(D, TOKENS, WIDTH)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        row = tile * TOKENS + tl.arange(0, TOKENS)
        present = row < tokens
        all_d = _load_all(grad_y, row, tokens, D, TOKENS, WIDTH, REREAD)
        all_x = _load_all(total, row, tokens, D, TOKENS, WIDTH, REREAD)
        all_o = _load_all(mixed, row, tokens, D, TOKENS, WIDTH, REREAD)
        if grad_total is not None:
            incoming = _load_all(grad_total, row, tokens, D, TOKENS, WIDTH, False)
        excess = tl.load(stats + row, mask=present, other=0.0)
        m = tl.sigmoid(excess)
        rest = tl.sigmoid(-excess)
        score = tl.load(stats + tokens + row, mask=present, other=0.0)
        inverse_rms = tl.load(stats + 2 * tokens + row, mask=present, other=0.0)
        if NORM == "rms":
            inverse = tl.load(stats + 3 * tokens + row, mask=present, other=0.0)
        if NORM == "layer":
            mean = tl.load(stats + 3 * tokens + row, mask=present, other=0.0)
            inverse = tl.load(stats + 4 * tokens + row, mask=present, other=0.0)

        # With e = x - o, z the normalised mixture and d the gradient of z, everything that a row needs is linear in the
        # sums of d e, d z, z e, d and e: one reduction. Padding adds nothing, as d and e are zero there.
        sums_de = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_dz = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_ze = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_d = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums_e = tl.zeros([TOKENS, WIDTH], tl.float32)
        next_dg = ()
        next_db = ()
        for start in tl.static_range(0, D, WIDTH):
            d = all_d[start // WIDTH].to(tl.float32)
            o = all_o[start // WIDTH].to(tl.float32)
            x = all_x[start // WIDTH].to(tl.float32)
            e = x - o
            if norm_bias is not None:
                next_db += (db[start // WIDTH] + d,)
            if NORM != "":
                z = scale * (rest[:, None] * o + m[:, None] * x)
                if NORM == "layer":
                    z = z - mean[:, None]
                z = z * inverse[:, None]
                if norm_weight is not None:
                    next_dg += (dg[start // WIDTH] + d * z,)
                    d = d * _features(norm_weight, start, D, TOKENS, WIDTH)
                sums_dz += d * z
                sums_ze += z * e
                if NORM == "layer":
                    sums_d += d
                    sums_e += e
            sums_de += d * e
        if norm_weight is not None:
            dg = next_dg
        if norm_bias is not None:
            db = next_db
        # `toward` is the gradient of m.
        if NORM == "rms":
            sum_dz, sum_de, sum_ze = tl.reduce((sums_dz, sums_de, sums_ze), 1, _add3)
            mean_dz = sum_dz / D
            toward = scale * inverse * (sum_de - mean_dz * sum_ze)
        elif NORM == "layer":
            sum_dz, sum_de, sum_ze, sum_d, sum_e = tl.reduce((sums_dz, sums_de, sums_ze, sums_d, sums_e), 1, _add5)
            mean_dz = sum_dz / D
            mean_d = sum_d / D
            toward = scale * inverse * (sum_de - mean_dz * sum_ze - mean_d * sum_e)
        else:
            toward = scale * tl.sum(sums_de, 1)
        d_score = m * rest * toward
        tl.store(grad_lse + row, -d_score, mask=present)
        along_w = d_score * inverse_rms
        along_x = d_score * score * inverse_rms * inverse_rms / D

        next_dw = ()
        for start in tl.static_range(0, D, WIDTH):
            if REREAD:
                d = _load(grad_y, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
                x = _load(total, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
                o = _load(mixed, start, row, tokens, D, TOKENS, WIDTH, False).to(tl.float32)
            else:
                d = all_d[start // WIDTH].to(tl.float32)
                x = all_x[start // WIDTH].to(tl.float32)
                o = all_o[start // WIDTH].to(tl.float32)
            if norm_weight is not None:
                d = d * _features(norm_weight, start, D, TOKENS, WIDTH)
            if NORM != "":
                z = scale * (rest[:, None] * o + m[:, None] * x)
                if NORM == "layer":
                    z = z - mean[:, None]
                    d = d - mean_d[:, None]
                d = (d - z * (inverse * mean_dz)[:, None]) * inverse[:, None]
            d = scale * d
            _store(grad_mixed, rest[:, None] * d, start, row, tokens, D, TOKENS, WIDTH)
            dx = m[:, None] * d + along_w[:, None] * _features(weight, start, D, TOKENS, WIDTH) - along_x[:, None] * x
            if grad_total is not None:
                dx += incoming[start // WIDTH].to(tl.float32)
            _store(grad, dx, start, row, tokens, D, TOKENS, WIDTH)
            next_dw += (dw[start // WIDTH] + along_w[:, None] * x,)
        dw = next_dw
    _store_sums(sums, dw, 0, D, WIDTH)
    if norm_weight is not None:
        _store_sums(sums, dg, 1, D, WIDTH)
    if norm_bias is not None:
        _store_sums(sums, db, 1 if norm_weight is None else 2, D, WIDTH)
