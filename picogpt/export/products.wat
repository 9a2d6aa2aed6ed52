;; A matrix-vector product with int8 weights: out = (W x) * scales + bias, eight weights at a time.
;; Where a browser has no WebAssembly with vectors, plain JavaScript takes its place. That sums in double precision,
;; so there the last digits differ.
(module
  (import "page" "memory" (memory 1))
  (func (export "multiply")
    ;; Addresses: W (rows, columns) in int8, the rest in float32. `columns` is a multiple of 8.
    (param $weights i32) (param $scales i32) (param $bias i32) (param $x i32) (param $out i32) (param $rows i32) (param $columns i32)
    (local $from i32) (local $end i32) (local $eight v128) (local $low v128) (local $high v128)

    local.get $columns  i32.const 2  i32.shl  local.get $x  i32.add  local.set $end
    loop $row
      f32.const 0  f32x4.splat  local.tee $low  local.set $high
      local.get $x  local.set $from
      loop $column
        local.get $weights  v128.load8x8_s  local.set $eight
        local.get $eight  i32x4.extend_low_i16x8_s  f32x4.convert_i32x4_s
        local.get $from  v128.load  f32x4.mul
        local.get $low  f32x4.add  local.set $low
        local.get $eight  i32x4.extend_high_i16x8_s  f32x4.convert_i32x4_s
        local.get $from  v128.load offset=16  f32x4.mul
        local.get $high  f32x4.add  local.set $high
        local.get $weights  i32.const 8  i32.add  local.set $weights
        local.get $from  i32.const 32  i32.add  local.tee $from
        local.get $end  i32.ne  br_if $column
      end

      ;; The sum of all eight, times the row's scale, plus its bias.
      local.get $out
      local.get $low  local.get $high  f32x4.add  local.tee $low  f32x4.extract_lane 0
      local.get $low  f32x4.extract_lane 1  f32.add
      local.get $low  f32x4.extract_lane 2  f32.add
      local.get $low  f32x4.extract_lane 3  f32.add
      local.get $scales  f32.load  f32.mul
      local.get $bias  f32.load  f32.add
      f32.store

      local.get $scales  i32.const 4  i32.add  local.set $scales
      local.get $bias  i32.const 4  i32.add  local.set $bias
      local.get $out  i32.const 4  i32.add  local.set $out
      local.get $rows  i32.const 1  i32.sub  local.tee $rows  br_if $row
    end))
