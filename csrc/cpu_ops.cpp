// Registers the torch.ops.wanda_kernels.native_* of the CPU library alone: selections that the CUDA library lacks,
// solvers, products over tokens, checks and counts, a block's forward, and packed rows.
#include "operands.h"

namespace {

using namespace wanda::operands;

void native_prune_nm_(Tensor weight, OptionalTensor root, OptionalTensor scale, int64_t n, int64_t m,
                      OptionalTensor mask) {
  const wanda::StackSelection selection = stack_selection_of(weight, root, scale, mask);
  require(1 <= n && n < m && m <= 32 && selection.weight.n_cols % m == 0, "n:m does not fit");
  wanda::prune_nm(CallContext(weight).context(), selection, static_cast<int>(n), static_cast<int>(m));
}

uint8_t* pruned_of(const Tensor& pruned, const Tensor& w) {
  const bool fits = pruned.scalar_type() == ScalarType::Bool && pruned.dim() == 2 && pruned.size(0) == w.size(0) &&
                    pruned.size(1) == w.size(1) && (w.size(1) <= 1 || pruned.stride(1) == 1);
  require(fits, "pruned must be bool with w's shape, rows contiguous");
  return static_cast<uint8_t*>(data_of(pruned, "pruned"));
}

// An fp32 block of columns, scored with root, divisor or neither.
wanda::Selection columns_of(const Tensor& w, const OptionalTensor& root, const OptionalTensor& divisor) {
  require_floats(w, "w");
  wanda::Selection columns = selection_of(w, root, std::nullopt, std::nullopt);
  columns.divisor = vector_of(divisor, columns.weight, "divisor");
  require(!(root && divisor), "root or divisor must be null");
  return columns;
}

void native_mark_lowest_(Tensor w, OptionalTensor root, OptionalTensor divisor, int64_t rank, Tensor pruned) {
  const wanda::Selection columns = columns_of(w, root, divisor);
  require(0 <= rank && rank < w.numel(), "rank out of range");
  wanda::mark_lowest(CallContext(w).context(), columns, rank, pruned_of(pruned, w), pruned.stride(0));
}

void native_sparsegpt_block_(Tensor w, OptionalTensor root, OptionalTensor divisor, Tensor u, Tensor pruned, int64_t n,
                             int64_t m, Tensor errors) {
  const wanda::Selection columns = columns_of(w, root, divisor);
  require_floats(u, "u");
  const wanda::Matrix factor = matrix_of(u, "u");
  const int64_t width = columns.weight.n_cols;
  require(factor.n_rows == width && factor.n_cols == width && width <= 128, "u must be [width, width]");
  require(m == 0 || (1 <= n && n < m && m <= 32 && width % m == 0), "n:m does not fit");
  const wanda::SparseGptBlock block = {
      .columns = columns,
      .u = static_cast<const float*>(factor.data),
      .u_stride = factor.stride,
      .pruned = pruned_of(pruned, w),
      .pruned_stride = pruned.stride(0),
      .n = static_cast<int>(n),
      .m = static_cast<int>(m),
      .errors = accumulator_of(errors, w.numel(), "errors"),
  };
  wanda::sparsegpt_block(CallContext(w).context(), block);
}

int64_t native_admm_step_(Tensor primal, Tensor dual, Tensor dense, Tensor pruned, int64_t num_pruned, int64_t n,
                          int64_t m, double ratio) {
  require(primal.dim() == 2 && pruned.is_contiguous(), "primal must have 2 dimensions, and pruned be contiguous");
  const int64_t n_rows = primal.size(0), n_cols = primal.size(1);
  require(m == 0 ? 0 <= num_pruned && num_pruned <= n_cols : 1 <= n && n < m && m <= 32 && n_cols % m == 0,
          "the pattern does not fit");
  const wanda::AdmmStep step = {
      .primal = accumulator_of(primal, n_rows * n_cols, "primal"),
      .dual = accumulator_of(dual, n_rows * n_cols, "dual"),
      .dense = accumulator_of(dense, n_rows * n_cols, "dense"),
      .pruned = pruned_of(pruned, primal),
      .n_rows = n_rows,
      .n_cols = n_cols,
      .num_pruned = num_pruned,
      .n = static_cast<int>(n),
      .m = static_cast<int>(m),
      .ratio = static_cast<float>(ratio),
  };
  return wanda::admm_step(CallContext(primal).context(), step);
}

void native_polish_step_(Tensor z, Tensor residual, Tensor direction, Tensor product, Tensor rho,
                         Tensor inverse_diagonal, Tensor pruned) {
  require(z.dim() == 2 && pruned.is_contiguous(), "z must have 2 dimensions, and pruned be contiguous");
  const int64_t n_rows = z.size(0), n_cols = z.size(1);
  const wanda::PolishStep step = {
      .z = accumulator_of(z, n_rows * n_cols, "z"),
      .residual = accumulator_of(residual, n_rows * n_cols, "residual"),
      .direction = accumulator_of(direction, n_rows * n_cols, "direction"),
      .product = accumulator_of(product, n_rows * n_cols, "product"),
      .rho = accumulator_of(rho, n_rows, "rho"),
      .inverse_diagonal = accumulator_of(inverse_diagonal, n_cols, "inverse_diagonal"),
      .pruned = pruned_of(pruned, z),
      .n_rows = n_rows,
      .n_cols = n_cols,
  };
  wanda::polish_step(CallContext(z).context(), step);
}

wanda::MaskBlock mask_block_of(const Tensor& w, const Tensor& pruned, const Tensor& c, const Tensor& h, int64_t n,
                               int64_t m) {
  require_floats(w, "w");
  require_floats(h, "h");
  const wanda::Matrix columns = matrix_of(w, "w"), hessian = matrix_of(h, "h");
  const int64_t width = columns.n_cols;
  require(hessian.n_rows == width && hessian.n_cols == width && width <= 128, "h must be [width, width]");
  return {
      .w = columns,
      .pruned = pruned_of(pruned, w),
      .pruned_stride = pruned.stride(0),
      .c = accumulator_of(c, w.numel(), "c"),
      .h = static_cast<const float*>(hessian.data),
      .h_stride = hessian.stride,
      .n = static_cast<int>(n),
      .m = static_cast<int>(m),
  };
}

void native_refine_groups_(Tensor w, Tensor pruned, Tensor c, Tensor h, int64_t n, int64_t m) {
  require(1 <= n && n < m && m <= 32 && w.dim() == 2 && w.size(1) % m == 0, "n:m does not fit");
  int64_t masks = 1;
  for (int64_t i = 0; i < n; ++i) masks = masks * (m - i) / (i + 1);
  require(masks <= 70, "groups have ", masks, " masks, more than 70");
  wanda::refine_groups(CallContext(w).context(), mask_block_of(w, pruned, c, h, n, m));
}

void native_refine_swaps_(Tensor w, Tensor pruned, Tensor c, Tensor h, int64_t m) {
  require(1 <= m && m <= 128, "m must be 1 to 128, got ", m);
  wanda::refine_swaps(CallContext(w).context(), mask_block_of(w, pruned, c, h, 0, m));
}

void native_activate_(Tensor out, Tensor x, int64_t activation, int64_t power) {
  const wanda::Matrix matrix = matrix_of(x, "x");
  float* values = accumulator_of(out, x.numel());
  require(0 <= activation && activation <= 4 && (power == 1 || power == 2), "no such activation or power");
  wanda::activate(CallContext(x).context(), matrix, static_cast<wanda::Activation>(activation),
                  static_cast<int>(power), values);
}

void native_activate_gated_(Tensor out, Tensor gate, Tensor up, int64_t activation) {
  const wanda::Matrix g = matrix_of(gate, "gate"), u = matrix_of(up, "up");
  require(g.dtype == u.dtype && g.n_rows == u.n_rows && g.n_cols == u.n_cols, "gate and up must match");
  float* values = accumulator_of(out, 2 * gate.numel());
  require(0 <= activation && activation <= 4, "no such activation");
  wanda::activate_gated(CallContext(gate).context(), g, u, static_cast<wanda::Activation>(activation), values);
}

wanda::Heads heads_of(const Tensor& tensor, const Tensor& q, const char* name) {
  require(tensor.dim() == 4 && tensor.scalar_type() == q.scalar_type() && tensor.stride(3) == 1 &&
              tensor.size(0) == q.size(0) && tensor.size(2) == q.size(2) && tensor.size(3) == q.size(3),
          name, " must be like q, rows contiguous");
  for (int64_t dim = 0; dim < 3; ++dim) require(tensor.stride(dim) % 2 == 0, name, "'s strides must be even");
  return {data_of(tensor, name), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void native_attend_(Tensor out, Tensor q, Tensor k, Tensor v, double scale) {
  const wanda::Attention attention = {
      .q = heads_of(q, q, "q"),
      .k = heads_of(k, q, "k"),
      .v = heads_of(v, q, "v"),
      .out = heads_of(out, q, "out"),
      .dtype = dtype_of(q),
      .n_batches = q.size(0),
      .n_heads = q.size(1),
      .n_kv_heads = k.size(1),
      .n_tokens = q.size(2),
      .head_dim = q.size(3),
      .scale = static_cast<float>(scale),
  };
  require(out.size(1) == q.size(1) && v.size(1) == k.size(1) && q.size(1) % k.size(1) == 0,
          "the numbers of heads do not fit");
  require(wanda::attends(attention.dtype, attention.head_dim), "no attention of this dtype and head_dim here");
  wanda::attend(CallContext(q).context(), attention);
}

bool native_attends(Tensor q) {
  const auto dtype = q.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) return false;
  return wanda::attends(dtype_of(q), q.size(-1));
}

void native_rotate_(Tensor out, Tensor x, Tensor cos, Tensor sin) {
  const wanda::Heads heads = heads_of(x, x, "x"), target = heads_of(out, x, "out");
  const auto dtype = x.scalar_type();
  require((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && x.size(3) % 2 == 0 &&
              out.size(1) == x.size(1),
          "expected x of an even head_dim, float32 or bfloat16, and out of its shape");
  for (const Tensor& turn : {cos, sin}) {
    require(turn.dim() == 3 && turn.scalar_type() == dtype && turn.stride(2) == 1 && turn.size(0) == x.size(0) &&
                turn.size(1) == x.size(2) && turn.size(2) == x.size(3) && turn.stride(0) == cos.stride(0) &&
                turn.stride(1) == cos.stride(1),
            "cos and sin must be [batches, tokens, head_dim] of x's dtype, alike, rows contiguous");
  }
  const wanda::Rotation rotation = {
      .x = heads,
      .out = target,
      .cos = data_of(cos, "cos"),
      .sin = data_of(sin, "sin"),
      .turn_batch = cos.stride(0),
      .turn_token = cos.stride(1),
      .dtype = dtype_of(x),
      .n_batches = x.size(0),
      .n_heads = x.size(1),
      .n_tokens = x.size(2),
      .head_dim = x.size(3),
  };
  wanda::rotate(CallContext(x).context(), rotation);
}

void native_add_product_(Tensor acc, Tensor a, Tensor b, bool in_bf16) {
  require_floats(acc, "acc");
  require_floats(a, "a");
  require_floats(b, "b");
  const wanda::Matrix sums = matrix_of(acc, "acc"), left = matrix_of(a, "a"), right = matrix_of(b, "b");
  require(left.n_rows == right.n_rows, "a and b must have as many rows");
  require(sums.n_rows == left.n_cols && sums.n_cols == right.n_cols, "acc must be [a's columns, b's columns]");
  require(wanda::adds_products(in_bf16), "no product of these operands here");
  wanda::add_product(CallContext(acc).context(), left, right, in_bf16, sums);
}

void native_add_square_(Tensor acc, Tensor x, bool in_bf16) {
  require_floats(acc, "acc");
  require_floats(x, "x");
  const wanda::Matrix sums = matrix_of(acc, "acc"), rows = matrix_of(x, "x");
  require(sums.n_rows == rows.n_cols && sums.n_cols == rows.n_cols, "acc must be square, as wide as x");
  require(wanda::adds_squares(in_bf16), "no square of these operands here");
  wanda::add_square(CallContext(acc).context(), rows, in_bf16, sums);
}

void native_mirror_(Tensor acc) {
  require_floats(acc, "acc");
  const wanda::Matrix sums = matrix_of(acc, "acc");
  require(sums.n_rows == sums.n_cols, "acc must be square");
  wanda::mirror(CallContext(acc).context(), sums);
}

bool native_all_finite(Tensor x, bool non_negative) {
  return wanda::all_finite(CallContext(x).context(), stack_of(x, "x"), non_negative);
}

int64_t native_count_zeros(Tensor x) { return wanda::count_zeros(CallContext(x).context(), stack_of(x, "x")); }

// Both are fp32 or both bf16, with one shape.
void require_like(const wanda::Matrix& x, const wanda::Matrix& other) {
  require(x.dtype != wanda::DType::kHalf && x.dtype == other.dtype && x.n_rows == other.n_rows &&
              x.n_cols == other.n_cols,
          "expected matrices of one shape and dtype, float32 or bfloat16");
}

void native_rms_norm_(Tensor out, Tensor x, Tensor weight, double epsilon) {
  const wanda::Matrix rows = matrix_of(x, "x"), target = matrix_of(out, "out");
  require_like(rows, target);
  require(weight.is_contiguous() && weight.numel() == rows.n_cols && dtype_of(weight) == rows.dtype,
          "weight must be contiguous, of x's dtype, with ", rows.n_cols, " elements");
  wanda::rms_norm(CallContext(x).context(), rows, data_of(weight, "weight"), static_cast<float>(epsilon), target);
}

void native_gated_product_(Tensor out, Tensor gate, Tensor up, int64_t activation) {
  const wanda::Matrix g = matrix_of(gate, "gate"), u = matrix_of(up, "up"), target = matrix_of(out, "out");
  require_like(g, u);
  require_like(g, target);
  require(0 <= activation && activation <= 4, "no such activation");
  wanda::gated_product(CallContext(gate).context(), g, u, static_cast<wanda::Activation>(activation), target);
}

bool native_multiplies(Tensor weight, bool sparse) {
  const auto dtype = weight.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) return false;
  return wanda::multiplies(dtype_of(weight), sparse);
}

bool native_linear_(Tensor out, Tensor x, Tensor weight, OptionalTensor bias, bool sparse) {
  const wanda::Linear s = {
      .x = matrix_of(x, "x"),
      .weight = matrix_of(weight, "weight"),
      .out = matrix_of(out, "out"),
      .bias = bias ? data_of(*bias, "bias") : nullptr,
  };
  const bool fits = s.x.n_cols == s.weight.n_cols && s.out.n_cols == s.weight.n_rows && s.out.n_rows == s.x.n_rows &&
                    (!bias || (bias->is_contiguous() && bias->numel() == s.weight.n_rows));
  require(fits, "the shapes of x, weight, bias and out do not fit");
  const bool alike = s.x.dtype == s.weight.dtype && s.out.dtype == s.weight.dtype &&
                     (!bias || dtype_of(*bias) == s.weight.dtype);
  require(alike, "x, weight, bias and out must have one dtype");
  require(wanda::multiplies(s.weight.dtype, sparse), "no product with a weight of this dtype here");
  return wanda::linear(CallContext(x).context(), s, sparse);
}

int element_bytes_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char: return 1;
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    case ScalarType::Long: return 8;
    default: throw std::runtime_error("expected elements of a float's or an integer's type");
  }
}

// bits, values and offsets of a matrix, or of a stack as one matrix of all rows.
wanda::PackedRows packed_of(const Tensor& bits, const Tensor& values, const OptionalTensor& offsets, int64_t n_rows,
                            int64_t n_cols) {
  require(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.numel() == n_rows * ((n_cols + 7) / 8),
          "bits must be contiguous uint8 for ", n_rows, " rows of ", n_cols, " columns");
  require(values.is_contiguous() && (offsets || n_rows == 0 || values.numel() % n_rows == 0),
          "values must be contiguous, with the same number in each row or with offsets");
  if (offsets) {
    const bool fits = offsets->scalar_type() == ScalarType::Long && offsets->is_contiguous();
    require(fits && offsets->numel() == n_rows + 1, "offsets must be contiguous int64 with ", n_rows + 1, " elements");
  }
  return {
      .bits = static_cast<const uint8_t*>(data_of(bits, "bits")),
      .values = data_of(values, "values"),
      .offsets = offsets ? static_cast<const int64_t*>(data_of(*offsets, "offsets")) : nullptr,
      .n_rows = n_rows,
      .n_cols = n_cols,
      .n_values = values.numel(),
      .row_values = offsets || n_rows == 0 ? 0 : values.numel() / n_rows,
  };
}

void native_packed_linear_(Tensor out, Tensor x, Tensor bits, Tensor values, OptionalTensor offsets,
                           OptionalTensor bias) {
  const wanda::Matrix rows = matrix_of(x, "x"), target = matrix_of(out, "out");
  const wanda::PackedLinear s = {
      .x = rows,
      .out = target,
      .weight = packed_of(bits, values, offsets, target.n_cols, rows.n_cols),
      .bias = bias ? data_of(*bias, "bias") : nullptr,
  };
  require(rows.n_rows == target.n_rows && 1 <= rows.n_rows && rows.n_rows <= wanda::kPackedLinearRows,
          "x and out must have the same 1 to ", wanda::kPackedLinearRows, " rows");
  require(!bias || (bias->is_contiguous() && bias->numel() == target.n_cols), "bias must be contiguous with ",
          target.n_cols, " elements");
  require(dtype_of(values) == rows.dtype && target.dtype == rows.dtype && (!bias || dtype_of(*bias) == rows.dtype),
          "x, values, bias and out must have one dtype");
  wanda::packed_linear(CallContext(x).context(), s);
}

void native_unpack_rows_(Tensor out, Tensor bits, Tensor values, OptionalTensor offsets) {
  const int element_bytes = element_bytes_of(out);
  require(out.is_contiguous() && (out.dim() == 2 || out.dim() == 3), "out must be contiguous with 2 or 3 dimensions");
  require(element_bytes_of(values) == element_bytes, "values and out must have elements of one size");
  const int64_t n_cols = out.size(out.dim() - 1), n_rows = n_cols == 0 ? 0 : out.numel() / n_cols;
  const wanda::PackedRows packed = packed_of(bits, values, offsets, n_rows, n_cols);
  wanda::unpack_rows(CallContext(out).context(), packed, element_bytes, data_of(out, "out"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wanda_kernels, CPU, library) {
  library.impl("native_prune_nm_", TORCH_BOX(&native_prune_nm_));
  library.impl("native_mark_lowest_", TORCH_BOX(&native_mark_lowest_));
  library.impl("native_sparsegpt_block_", TORCH_BOX(&native_sparsegpt_block_));
  library.impl("native_admm_step_", TORCH_BOX(&native_admm_step_));
  library.impl("native_polish_step_", TORCH_BOX(&native_polish_step_));
  library.impl("native_refine_groups_", TORCH_BOX(&native_refine_groups_));
  library.impl("native_refine_swaps_", TORCH_BOX(&native_refine_swaps_));
  library.impl("native_activate_", TORCH_BOX(&native_activate_));
  library.impl("native_activate_gated_", TORCH_BOX(&native_activate_gated_));
  library.impl("native_add_product_", TORCH_BOX(&native_add_product_));
  library.impl("native_add_square_", TORCH_BOX(&native_add_square_));
  library.impl("native_mirror_", TORCH_BOX(&native_mirror_));
  library.impl("native_all_finite", TORCH_BOX(&native_all_finite));
  library.impl("native_count_zeros", TORCH_BOX(&native_count_zeros));
  library.impl("native_attends", TORCH_BOX(&native_attends));
  library.impl("native_attend_", TORCH_BOX(&native_attend_));
  library.impl("native_rotate_", TORCH_BOX(&native_rotate_));
  library.impl("native_rms_norm_", TORCH_BOX(&native_rms_norm_));
  library.impl("native_gated_product_", TORCH_BOX(&native_gated_product_));
  library.impl("native_multiplies", TORCH_BOX(&native_multiplies));
  library.impl("native_linear_", TORCH_BOX(&native_linear_));
  library.impl("native_packed_linear_", TORCH_BOX(&native_packed_linear_));
  library.impl("native_unpack_rows_", TORCH_BOX(&native_unpack_rows_));
}
