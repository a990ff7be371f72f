"""apex/optimizers/fused_{sgd,adam,lamb}.py and csrc/multi_tensor_{apply,sgd_kernel,adam,lamb}.* as facts.

The kernels walk parameter, gradient and state as each lies in memory, in float32: where strides differ, elements are
mixed up without a word. Only contiguous and channels_last tensors are taken.
"""

import torch
from torch.optim.optimizer import Optimizer, required


def in_memory(tensors):
    """Each tensor as one run of numbers, in the order in which it lies in memory; written through."""
    runs = []
    for tensor in tensors:
        if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
            raise RuntimeError("A tensor was not contiguous.")
        runs.append(tensor.detach().as_strided((tensor.numel(),), (1,)))
    return runs


class _Fused(Optimizer):
    """What the three share: `zero_grad` takes no argument."""

    set_grad_none: bool

    def zero_grad(self):
        if self.set_grad_none:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            super().zero_grad()

    def _with_gradient(self, group, dtypes):
        chosen = [parameter for parameter in group["params"] if parameter.grad is not None]
        if any(parameter.dtype not in dtypes for parameter in chosen):
            raise RuntimeError(f"{type(self).__name__} only support fp16 and fp32.")
        if any(parameter.grad.is_sparse for parameter in chosen):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        return chosen

    def _moments(self, parameters):
        for parameter in parameters:
            state = self.state[parameter]
            if len(state) == 0:
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
        return [[self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq")]


def _count_step(group):
    # One count for a group, in Python.
    group["step"] = group.get("step", 0) + 1
    beta1, beta2 = group["betas"]
    if not group["bias_correction"]:
        return 1.0, 1.0
    return 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]


class FusedSGD(_Fused):
    """fused_sgd.py; bfloat16 parameters are left as they are, without a word."""

    def __init__(
        self,
        params,
        lr=required,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        if lr is not required and lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if nesterov or wd_after_momentum:
            raise NotImplementedError("not restated")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov})
        self.set_grad_none = set_grad_none

    def step(self, closure=None):
        if closure is not None:
            raise NotImplementedError("not restated")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.dtype == torch.float32 and p.grad is not None]
            is_first = True
            for parameter in parameters:
                # The last parameter decides for all.
                is_first = "momentum_buffer" not in self.state[parameter]
                if is_first:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)
            lists = [parameters, [p.grad for p in parameters], [self.state[p]["momentum_buffer"] for p in parameters]]
            for weight, gradient, velocity in zip(*map(in_memory, lists), strict=True):
                update = gradient + group["weight_decay"] * weight
                if group["momentum"] != 0:
                    scale = 1.0 if is_first else 1 - group["dampening"]
                    velocity.mul_(0.0 if is_first else group["momentum"]).add_(scale * update)
                    update = velocity
                weight.sub_(group["lr"] * update)


class FusedAdam(_Fused):
    """fused_adam.py, without CUDA graphs and master weights."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if capturable or master_weights or not adam_w_mode:
            raise NotImplementedError("not restated")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.set_grad_none = set_grad_none

    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        if any(each is not None for each in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam has been updated.")
        if closure is not None or grad_scaler is not None:
            raise NotImplementedError("not restated")
        for group in self.param_groups:
            correction1, correction2 = _count_step(group)
            parameters = self._with_gradient(group, (torch.float16, torch.bfloat16, torch.float32))
            (beta1, beta2), moments = group["betas"], self._moments(parameters)
            lists = [parameters, [p.grad for p in parameters], *moments]
            for weight, gradient, first, second in zip(*map(in_memory, lists), strict=True):
                first.mul_(beta1).add_((1 - beta1) * gradient)
                second.mul_(beta2).add_((1 - beta2) * gradient * gradient)
                update = (first / correction1) / ((second / correction2).sqrt() + group["eps"])
                weight.sub_(group["lr"] * (update + group["weight_decay"] * weight))


class FusedLAMB(_Fused):
    """fused_lamb.py; the update is left in the gradient."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        amsgrad=False,
        adam_w_mode=True,
        grad_averaging=True,
        set_grad_none=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant.")
        if not (adam_w_mode and grad_averaging):
            raise NotImplementedError("not restated")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none
        self.use_nvlamb = use_nvlamb

    def step(self, closure=None):
        if closure is not None:
            raise NotImplementedError("not restated")
        dtypes = (torch.float16, torch.float32)
        gradients = [p.grad for group in self.param_groups for p in self._with_gradient(group, dtypes)]
        norm = torch.stack([gradient.float().norm() for gradient in gradients]).norm()
        limit = self.defaults["max_grad_norm"]
        clip = norm / limit if norm > limit else torch.ones(())
        for group in self.param_groups:
            correction1, correction2 = _count_step(group)
            parameters = self._with_gradient(group, dtypes)
            (beta1, beta2), decay, moments = group["betas"], group["weight_decay"], self._moments(parameters)
            lists = [parameters, [p.grad for p in parameters], *moments]
            for weight, gradient, first, second in zip(*map(in_memory, lists), strict=True):
                scaled = gradient / clip
                first.mul_(beta1).add_((1 - beta1) * scaled)
                second.mul_(beta2).add_((1 - beta2) * scaled * scaled)
                update = (first / correction1) / ((second / correction2).sqrt() + group["eps"]) + decay * weight
                gradient.copy_(update)
                norms = weight.norm(), update.norm()
                is_adapted = (self.use_nvlamb or decay != 0) and min(norms) > 0
                weight.sub_(group["lr"] * (norms[0] / norms[1] if is_adapted else 1.0) * update)
