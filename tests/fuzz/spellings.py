"""How norms, branches, adds and everything else of a recipe are spelled in PyTorch."""

# Expressions over x, [..., D]; {w} and {b} are the weight and the bias, {e} is eps.
SPELLINGS = {
    "F.layer_norm": "F.layer_norm({x}, ({d},), {w}, {b}, {e})",
    "F.rms_norm": "F.rms_norm({x}, ({d},), {w}, {e})",
    "rms by rsqrt": "{w} * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + {e}))",
    "rms by pow": "{w} * ({x} * ({x}.square().mean(-1, keepdim=True) + {e}) ** -0.5)",
    "rms by sqrt": "{w} * ({x} / torch.sqrt(({x} * {x}).mean(dim=-1, keepdim=True) + {e}))",
    "rms one plus weight": "(1 + {w}) * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + {e}))",
    "rms upcast": "{w} * ({x}.to(torch.float64) * torch.rsqrt({x}.to(torch.float64).pow(2).mean(-1, keepdim=True) + {e})).to("
    "{x}.dtype)",
    # Rounded to float32, but reduced in float64: how a float32 reduction rounds depends on the layout in memory.
    "rms in float32": "{w} * ({x}.float() * torch.rsqrt({x}.float().double().pow(2).mean(-1, keepdim=True) + {e}).float())"
    ".type_as({x})",
    "rms by norm": "{w} * {x} / ({x}.norm(dim=-1, keepdim=True) * {d} ** -0.5 + {e})",
    "rms by einsum": "{w} * ({x} * torch.rsqrt(torch.einsum('...d,...d->...', {x}, {x}).unsqueeze(-1) / {d} + {e}))",
    "F.normalize": "F.normalize({x}, dim=-1) * {d} ** 0.5 * {w}",
    "layer by mean": "{w} * ({x} - {x}.mean(-1, keepdim=True)) * torch.rsqrt(({x} - {x}.mean(-1, keepdim=True)).pow(2).mean(-1, "
    "keepdim=True) + {e}) + {b}",
    "layer by var": "({x} - {x}.mean(-1, keepdim=True)) / torch.sqrt({x}.var(-1, unbiased=False, keepdim=True) + {e}) * {w} "
    "+ {b}",
    "layer by var_mean": "({x} - torch.var_mean({x}, dim=-1, keepdim=True)[1]) * torch.rsqrt(torch.var_mean({x}, dim=-1, "
    "correction=0, keepdim=True)[0] + {e}) * {w} + {b}",
    "layer by std": "{w} * ({x} - {x}.mean(-1, keepdim=True)) / ({x}.std(-1, keepdim=True) + {e}) + {b}",
    "mean of abs": "{x} / ({x}.abs().mean(-1, keepdim=True) + {e}) * {w}",
    "amax": "{x} / {x}.abs().amax(-1, keepdim=True).clamp_min({e}) * {w}",
    "group of one": "F.group_norm({x}.reshape(-1, {d}), 1, {w}, {b}, {e}).view({x}.shape)",
}
MODULES = {
    "nn.LayerNorm": "nn.LayerNorm({d}, eps={e})",
    "nn.LayerNorm without weight": "nn.LayerNorm({d}, eps={e}, elementwise_affine=False)",
    "nn.RMSNorm": "nn.RMSNorm({d}, eps={e})",
    "nn.RMSNorm without weight": "nn.RMSNorm({d}, eps={e}, elementwise_affine=False)",
}

BRANCH_CLASSES = {
    "mlp": '''
class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, n):
        return self.down(F.gelu(self.up(n)))
''',
    "gated": '''
class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, n):
        return self.down(F.silu(self.gate(n)) * self.up(n))
''',
    "attention": '''
class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, n):
        q, k, v = self.qkv(n).unsqueeze(1).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
''',
    "cross": '''
class Cross(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, n, memory):
        k, v = self.kv(memory).chunk(2, dim=-1)
        return self.out(torch.softmax(self.q(n) @ k.transpose(1, 2), -1) @ v)
''',
    "tokens": '''
class Tokens(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.mix = nn.Linear(tokens, tokens)

    def forward(self, n):
        return F.gelu(self.mix(n.transpose(1, 2))).transpose(1, 2)
''',
    "conv": '''
class Conv(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, n):
        return self.conv(n.transpose(1, 2)).transpose(1, 2)
''',
    "experts": '''
class Experts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, n):
        weights = self.router(n).softmax(-1)
        return sum(weights[..., i : i + 1] * F.gelu(expert(n)) for i, expert in enumerate(self.experts))
''',
}  # fmt: skip
BRANCHES = {
    "linear": "nn.Linear({d}, {d})", "mlp": "MLP({d})", "gated": "Gated({d})", "attention": "Attention({d})",
    "cross": "Cross({d})", "tokens": "Tokens({t})", "conv": "Conv({d})", "experts": "Experts({d})",
    "in-place mlp": "nn.Sequential(nn.Linear({d}, {d}), nn.ReLU(inplace=True), nn.Linear({d}, {d}))",
}  # fmt: skip

ADDS = {
    "x + b": "x = x + b", "b + x": "x = b + x", "x += b": "x += b", "x.add_(b)": "x.add_(b)",
    "torch.add": "x = torch.add(input=x, other=b)", "x.add": "x = x.add(b)", "alpha": "x = torch.add(x, b, alpha=0.5)",
    "x - b": "x = x - b", "x - (-b)": "x = x - (-b)", "x -= b": "x -= b", "rsub": "x = torch.rsub(-b, x)",
    "addcmul": "x = torch.addcmul(x, {mix}, b)", "addcmul_": "x.addcmul_({mix}, b)", "lerp": "x = torch.lerp(x, b, 0.5)",
    "lerp to the sum": "x = torch.lerp(x, x + b, 0.5)", "where": "x = torch.where(mask > 0, x + b, x)",
    "where reversed": "x = torch.where(mask > 0, x, x + b)", "stack": "x = torch.stack([x, b]).sum(0)",
    "builtin sum": "x = sum([x, b])", "b += x": "b += x\nx = b",
    "add on tokens": "x = (x.flatten(0, -2) + b.flatten(0, -2)).view(x.shape)",
    "add on transposed": "x = (x.transpose(1, 2) + b.transpose(1, 2)).transpose(1, 2)",
    "transposed in place": "x.transpose(1, 2).add_(b.transpose(1, 2))", "add_ with alpha": "x.add_(b, alpha=2)",
    "weighted": "x = 0.9 * x + b", "halved sum": "x = (x + b) / 2",
    "index_add": "x = x.index_add(1, torch.arange(x.shape[1]), b)",
    "split off": "x = torch.cat([x[:, :1], x[:, 1:] + b[:, 1:]], dim=1)", "slice in place": "x[:].add_(b)",
    "masked sum": "x = (x + b) * mask", "masked after": "x = x + b * mask", "squared": "x = torch.addcmul(x, b, b, value=0.5)",
    "gate scalar": "x = x + {alpha} * b", "einsum": 'x = x + torch.einsum("...d,d->...d", b, {mix})',
    "torch.sum": "x = torch.sum(torch.stack((x, b), -1), -1)",
}  # fmt: skip
TRANSFORMS = {
    "mask": "x = x * mask", "mask in place": "x.mul_(mask)", "scale": "x = x * 0.9", "divide": "x = x / 2",
    "scale in place": "x *= 0.9", "parameter": "x = {alpha} * x",
    "transpose": "x = x.transpose(0, 1).clone().transpose(0, 1)", "flat": "x = x.reshape(-1, {d}).reshape(x.shape)",
    "clone": "x = x.clone()", "contiguous": "x = x.contiguous()", "cast": "x = x.to(x.dtype)",
    "dropout": "x = F.dropout(x, 0.1, False)", "slice all": "x = x[:, :]", "square root": "x = x * {d} ** -0.5",
    "plus zero": "x = x + 0", "rejoined": "x = torch.cat([x[:1], x[1:]])", "doubled": "x = x + x",
    "unsqueeze": "x = x.unsqueeze(0).squeeze(0)",
}  # fmt: skip
READERS = {
    "hidden": "aux.append(x)", "hidden view": "aux.append(x.transpose(0, 1))", "hidden clone": "aux.append(x.clone())",
    "pooled": "aux.append(x.mean(0))", "router": "aux.append({router}(x).softmax(-1))", "normed": "aux.append({norm})",
    "largest": "aux.append(x.abs().amax(-1))", "token": "aux.append(x[0])", "detached": "aux.append(x.detach().amin(-1))",
    "squares": "aux.append((x * x).sum(-1))", "scaled": "aux.append(x * 0.5)", "hidden detached": "aux.append(x.detach())",
    "statistics": "aux.append(x.std(-1))",
}  # fmt: skip
EMBEDDINGS = {
    "ids": "x = {ids}(ids)", "ids and positions": "x = {ids}(ids) + {positions}",
    "scaled ids": "x = {ids}(ids) * {d} ** 0.5", "normed ids": "x = {layer_norm}({ids}(ids))",
    "patches": "x = {project}(patches)",
    "patches and cls": "x = torch.cat([{cls}.expand(patches.shape[0], 1, {d}), {project}(patches)[:, 1:]], dim=1)",
    "input": "x = entry", "projected input": "x = {entry}(entry)", "latents": "x = {latents}.expand(ids.shape[0], -1, -1)",
    "straight through": "x = {ids}(ids)\nx = x + (x.round() - x).detach()",
    "dropped ids": "x = F.dropout({ids}(ids), 0.25, self.training)", "masked patches": "x = {project}(patches) * mask",
}  # fmt: skip
HEADS = {
    "norm and linear": "{head}({norm})", "norm": "{norm}", "raw": "x", "raw linear": "{head}(x)",
    "norm pooled": "{norm}.mean(1)", "sum normed": "{norm} + {head}({norm})",
}  # fmt: skip
