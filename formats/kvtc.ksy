meta:
  id: kvtc
  title: The kvtc stream, format 1.x
  file-extension: kvtc
  license: Apache-2.0
  endian: le
doc: |
  A compressed key/value cache of a language model. SPEC.md beside this file is normative; this
  description reads the structure, and verifies no checksum and no rule of section 15.
seq:
  - id: preamble
    type: preamble
  - id: header
    type: header
    size: preamble.header_length
  - id: items
    type: item
    repeat: eos
types:
  digest:
    seq:
      - id: length
        type: u1
      - id: value
        size: length
  text:
    seq:
      - id: length
        type: u2
      - id: value
        type: str
        size: length
        encoding: UTF-8
  preamble:
    seq:
      - id: magic
        contents: [0x8b, KVT, 0x0d, 0x0a, 0x1a, 0x0a]
      - id: major
        type: u2
        valid: 1
      - id: minor
        type: u2
      - id: required_features
        type: u4
        valid:
          expr: _ < 4
      - id: optional_features
        type: u4
      - id: checksum_algorithm
        type: u4
        enum: checksum_algorithm
      - id: header_length
        type: u8
      - id: seed
        type: u8
  header:
    seq:
      - id: dtype
        type: u1
        enum: element_type
      - id: output_dtype
        type: u1
        enum: element_type
      - id: coder
        type: u1
        enum: coder
      - id: reserved
        contents: [0]
      - id: sinks
        type: u4
      - id: window
        type: u4
      - id: block_tokens
        type: u4
      - id: calibration
        size: 32
      - id: token_digest
        type: digest
      - id: model_name
        type: text
      - id: model_revision
        type: text
      - id: model_fingerprint
        type: digest
      - id: rotary_table_count
        type: u2
      - id: rotary_tables
        type: rotary_table
        repeat: expr
        repeat-expr: rotary_table_count
      - id: section_count
        type: u2
      - id: sections
        type: section
        repeat: expr
        repeat-expr: section_count
      - id: plan_length
        type: u4
      - id: plan
        type: plan
        size: plan_length
      - id: scales
        type: scales(sections[_index])
        repeat: expr
        repeat-expr: section_count
        if: dtype == element_type::float8_e4m3fn or dtype == element_type::float8_e5m2
      - id: metadata_length
        type: u4
      - id: metadata
        type: str
        size: metadata_length
        encoding: UTF-8
  rotary_table:
    seq:
      - id: pairs
        type: u2
      - id: flags
        type: u1
        valid:
          expr: _ < 4
      - id: scale
        type: f4
      - id: inverse_frequencies
        type: f4
        repeat: expr
        repeat-expr: pairs
      - id: axes
        type: u1
        repeat: expr
        repeat-expr: pairs
        if: flags & 2 != 0
  section:
    seq:
      - id: layer_count
        type: u2
      - id: kv_heads
        type: u4
      - id: k_dim
        type: u4
      - id: v_dim
        type: u4
      - id: layers
        type: u4
        repeat: expr
        repeat-expr: layer_count
      - id: rotary_tables
        type: u2
        repeat: expr
        repeat-expr: layer_count
  scales:
    params:
      - id: section
        type: section
    seq:
      - id: k_scales
        type: f4
        repeat: expr
        repeat-expr: section.layer_count * section.kv_heads
      - id: v_scales
        type: f4
        repeat: expr
        repeat-expr: section.layer_count * section.kv_heads
  plan:
    seq:
      - id: magic
        contents: KVTP
      - id: version
        type: u2
        valid: 2
      - id: preset
        type: text
      - id: section_count
        type: u2
      - id: sections
        type: section_plan
        repeat: expr
        repeat-expr: section_count
  section_plan:
    seq:
      - id: basis
        type: text
      - id: expected_k_error
        type: f4
      - id: expected_v_error
        type: f4
      - id: expected_bits
        type: f4
      - id: part_count
        type: u2
      - id: parts
        type: part_plan
        repeat: expr
        repeat-expr: part_count
  part_plan:
    seq:
      - id: k_layer_count
        type: u2
      - id: k_layers
        type: u2
        repeat: expr
        repeat-expr: k_layer_count
      - id: v_layer_count
        type: u2
      - id: v_layers
        type: u2
        repeat: expr
        repeat-expr: v_layer_count
      - id: band_count
        type: u4
      - id: bands
        type: band
        repeat: expr
        repeat-expr: band_count
  band:
    seq:
      - id: size
        type: u4
      - id: quantiser
        type: u1
        enum: quantiser
      - id: step
        type: u1
        if: quantiser == quantiser::uniform
  item:
    doc: A record, and the trailer after an INDEX.
    seq:
      - id: record
        type: record
      - id: trailer
        type: trailer
        if: record.type == record_type::index
  record:
    seq:
      - id: magic
        contents: KVTR
      - id: type
        type: u1
        enum: record_type
      - id: flags
        type: u1
      - id: section
        type: u2
      - id: sequence
        type: u4
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: payload_length
        type: u8
      - id: header_checksum
        type: u8
      - id: payload
        size: payload_length
        type:
          switch-on: type
          cases:
            'record_type::block': block
            'record_type::index': index
            'record_type::supersede': digest
      - id: payload_checksum
        type: u8
  block:
    seq:
      - id: tokens
        type: u4
      - id: verbatim_tokens
        type: u4
      - id: start
        type: u8
      - id: first_position
        type: s8
      - id: role
        type: u1
        enum: role
      - id: listed_positions
        type: u1
      - id: measure
        type: u1
        enum: measure
      - id: coder
        type: u1
        enum: coder
      - id: verbatim_coder
        type: u1
        enum: coder
      - id: contents
        type: u1
        valid:
          expr: _ < 4
      - id: rotary_variant
        contents: [0]
      - id: reserved
        contents: [0]
      - id: coded_size
        type: u8
      - id: coded_length
        type: u8
      - id: verbatim_length
        type: u8
      - id: errors
        type: f4
        repeat: expr
        repeat-expr: 4
      - id: cut_front
        type: u4
      - id: cut_end
        type: u4
      - id: positions
        type: s8
        repeat: expr
        repeat-expr: tokens - 1
        if: listed_positions == 1
      - id: verbatim_bitmap
        size: (tokens + 7) / 8
        if: verbatim_tokens > 0 and verbatim_tokens < tokens
      - id: axes
        type: axes(tokens)
        if: contents & 2 != 0
      - id: layer_errors
        type: layer_errors(section.layer_count)
        if: contents & 1 != 0
      - id: coded
        size: coded_length
      - id: verbatim
        size: verbatim_length
    instances:
      section:
        value: _root.header.sections[_parent.section]
  axes:
    params:
      - id: tokens
        type: u4
    seq:
      - id: kind
        type: u1
        enum: axes_kind
      - id: count
        type: u1
      - id: shift
        type: s8
        if: kind == axes_kind::shifted
      - id: first
        type: s8
        repeat: expr
        repeat-expr: count
        if: kind != axes_kind::shifted
      - id: steps
        type:
          switch-on: kind
          cases:
            'axes_kind::listed8': s1
            'axes_kind::listed16': s2
            'axes_kind::listed32': s4
            'axes_kind::listed64': s8
        repeat: expr
        repeat-expr: (tokens - 1) * count
        if: kind != axes_kind::shifted
  layer_errors:
    doc: A code per layer each, SPEC section 8.2.
    params:
      - id: layers
        type: u2
    seq:
      - id: k_mean
        type: u1
        repeat: expr
        repeat-expr: layers
      - id: k_worst
        type: u1
        repeat: expr
        repeat-expr: layers
      - id: v_mean
        type: u1
        repeat: expr
        repeat-expr: layers
      - id: v_worst
        type: u1
        repeat: expr
        repeat-expr: layers
  index:
    seq:
      - id: count
        type: u4
      - id: entries
        type: entry
        repeat: expr
        repeat-expr: count
  entry:
    seq:
      - id: offset
        type: u8
      - id: length
        type: u8
      - id: type
        type: u1
        enum: record_type
      - id: role
        type: u1
        enum: role
      - id: measure
        type: u1
        enum: measure
      - id: reserved
        contents: [0]
      - id: section
        type: u2
      - id: reserved2
        contents: [0, 0]
      - id: tokens
        type: u4
      - id: verbatim_tokens
        type: u4
      - id: start
        type: u8
      - id: first_position
        type: s8
      - id: last_position
        type: s8
      - id: coded_length
        type: u8
      - id: verbatim_length
        type: u8
      - id: errors
        type: f4
        repeat: expr
        repeat-expr: 4
  trailer:
    seq:
      - id: index_offset
        type: u8
      - id: total_length
        type: u8
      - id: records
        type: u4
      - id: reserved
        contents: [0, 0, 0, 0]
      - id: checksum
        type: u8
      - id: end_magic
        contents: [KVTEND, 0x0d, 0x0a]
enums:
  element_type:
    1: float32
    2: float16
    3: bfloat16
    4: float8_e4m3fn
    5: float8_e5m2
  quantiser:
    0: none
    1: int2
    2: int4
    3: fp8
    4: uniform
  coder:
    0: stored
    1: deflate
    2: zstd
    3: lz4
    4: rans
    5: planes
  record_type:
    1: block
    2: index
    4: supersede
    64: user
    65: encoder
    66: auth
  role:
    0: data
    1: sinks
    2: tail
  checksum_algorithm:
    1: xxh3_64
  measure:
    0: none
    1: coefficients
    2: reconstruction
  axes_kind:
    1: shifted
    2: listed8
    3: listed16
    4: listed32
    5: listed64
